"""What is kept on a tape and what is not, and how much room it has."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from closeness import relative_error
from taping import FAMILIES, PROMPTS, STOP, plain, policy_of, recording, sampled, update

from polymath_fast.config import Config
from polymath_fast.errors import OutOfMemory, UserError
from polymath_fast.kernels.cpu import tiles
from polymath_fast.learner.packing import merge_duplicates
from polymath_fast.learner.step import Learner
from polymath_fast.models import read_config
from polymath_fast.rollout import tape_room, tile_weights
from polymath_fast.rollout.speculation import Speculation
from polymath_fast.rollout.tape import Tape
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.types import Request, SamplingOptions


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_completions_beyond_the_tape_are_computed_as_ever(share, passes):
    """What is recorded fills the tape, however short completions turn out to be."""
    policy, options = policy_of("random:tiny", torch.float32), {"prompts": PROMPTS[:1], "n": 48}
    truth = sampled(policy, Tape(), **options)
    assert not any(row.recorded for row in truth)
    large = recording(2000)
    sampled(policy, large, **options)
    tape = recording(int(share * large.draws.taken))
    rows = sampled(policy, tape, **options)
    assert [row.token_ids for row in rows] == [row.token_ids for row in truth]
    kept = [row for row in rows if row.recorded is not None]
    assert 0 < len(kept) < len(rows) and tape.draws.left < 30
    held = {int(place) for row in kept for place in row.recorded.predictions.rows}
    assert len(held) == tape.draws.taken
    assert relative_error(update(policy, rows)[1], update(policy, truth)[1]) < 1e-5
    assert sum(passes) == len(merge_duplicates(kept))


def test_waves_share_a_tape_that_is_just_large_enough(passes):
    """Each completion draws one more token than it reads."""
    policy = policy_of("random:tiny", torch.float32)
    options = {"length": 6, "stop": (), "n": 16, "max_num_seqs": 16}
    large = recording(2 * 16 * 6)
    rows = sampled(policy, large, **options)
    assert {len(row.token_ids) for row in rows} == {6} and all(row.recorded for row in rows)
    assert relative_error(update(policy, rows)[1], update(policy, plain(rows))[1]) < 1e-5
    least = large.draws.taken
    assert large.inputs.taken < least < 2 * 16 * 6  # completions that begin alike share rows
    for size, lost in ((least, 0), (least - 1, 1)):
        some = sampled(policy, recording(size), **options)
        assert sum(row.recorded is None for row in some) == lost


def test_a_tape_that_drafts_fill_early_keeps_what_it_has(passes):
    policy = policy_of("random:tiny", torch.float32)
    speculation = Speculation(8, rows=96)
    for prompt in PROMPTS:
        speculation.history.add(prompt, [[40 + i % 3 for i in range(60)]] * 3)
    rows = sampled(policy, recording(300), speculation=speculation)
    assert relative_error(update(policy, rows)[1], update(policy, plain(rows))[1]) < 1e-5
    assert len(rows) > sum(passes) == sum(row.recorded is not None for row in rows) > 0


def test_other_weights_have_no_use_for_a_recording(passes):
    policy = policy_of("random:tiny", torch.float32)
    rows = sampled(policy, recording(2000))
    stale = [replace(row, recorded=row.recorded._replace(weight_version=1)) for row in rows]
    assert torch.equal(update(policy, stale)[1], update(policy, plain(rows))[1])
    assert not passes


def test_nothing_is_recorded_between_steps():
    policy, tape = policy_of("random:tiny", torch.float32), Tape(2000)
    assert not any(row.recorded for row in sampled(policy, tape, n=3))
    tape.start_step()
    first = sampled(policy, tape, n=3)
    used = tape.inputs.taken
    assert all(row.recorded for row in first) and used > 0
    tape.end_step()
    assert not any(row.recorded for row in sampled(policy, tape, n=3))
    tape.start_step()
    again = sampled(policy, tape, n=3)
    assert (
        tape.inputs.taken == used and again[0].recorded.activations is first[0].recorded.activations
    )


@pytest.mark.parametrize("family", [*FAMILIES, "random:tiny-gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_config_tells_whether_there_will_be_a_tape(family, dtype, monkeypatch):
    policy = policy_of(family, dtype)
    shape = read_config(policy.model_dir)
    assert tape_room.in_tiles(shape, dtype) == tile_weights.fits(policy) == (family in FAMILIES)
    if family in FAMILIES:
        sizes = tile_weights.TileWeights(policy).sizes
        assert tape_room.DecoderSizes.of(shape, dtype) == sizes
        tape = Tape(100)
        tape.open(sizes)
        held = sum(each.nbytes for each in (*tape.activations, tape.exponentials))
        assert held == 100 * tape_room.row_bytes(shape, Config(), dtype)
    monkeypatch.setattr(tiles, "available", lambda asked: asked != dtype)
    assert not tape_room.in_tiles(shape, dtype) and not tile_weights.fits(policy)


def test_no_room_for_the_tape_names_the_setting():
    with pytest.raises(UserError, match=r"--tape-gib \d\S*, or 0"):
        sampled(policy_of("random:tiny", torch.float32), recording(10**14))


def test_out_of_memory_names_the_tape():
    policy = policy_of("random:tiny", torch.float32)
    rows = sampled(policy, recording(2000), n=40, stop=(), prompts=PROMPTS[:1])
    learner = Learner(policy, Config(max_completion_length=30, tokens_per_microbatch=40))

    def refuse(*_):
        raise MemoryError

    policy.share = refuse
    told = r"(\d+) tokens .* is 40, 4 times that from the tape\).*--tape-gib 0 or (--\S+ 35)"
    with pytest.raises(OutOfMemory, match=told) as raised:
        learner.update(rows, 0)
    assert 130 < int(re.search(told, str(raised.value))[1]) <= 160


def test_an_aborted_completion_is_not_recorded():
    policy, tape = policy_of("random:tiny", torch.float32), recording(2000)
    engine = TransformersEngine(policy, stop_token_ids=STOP, tape=tape)
    request = Request(prompt_ids=PROMPTS[0], n=24, needed=6)
    sampling = SamplingOptions(max_completion_length=30, seed=3)
    found = [done for _, _, done in engine.stream([request], sampling)]
    aborted = [done for done in found if done.finish_reason == "aborted"]
    assert aborted and not any(done.recorded for done in aborted)
    kept = [done.recorded for done in found if done.finish_reason != "aborted"]
    held = {int(place) for recorded in kept for place in recorded.predictions.rows}
    assert tape.draws.taken == len(held)  # others may have those of the aborted ones


def test_a_continued_completion_is_not_recorded():
    """What it began with was computed by another pass."""
    policy, tape = policy_of("random:tiny", torch.float32), recording(2000)
    engine = TransformersEngine(policy, stop_token_ids=[2], tape=tape)
    sampling = SamplingOptions(max_completion_length=8, seed=1)
    begun = engine.generate(PROMPTS[0], 1, sampling)[0]
    request = Request(prompt_ids=PROMPTS[0], n=3, begun=(replace(begun, finish_reason="aborted"),))
    longer = SamplingOptions(max_completion_length=20, seed=2)
    found = {index: done for _, index, done in engine.stream([request], longer)}
    assert begun.recorded and found[0].token_ids[:8] == begun.token_ids
    assert [found[i].recorded is not None for i in range(3)] == [False, True, True]
