"""Learning from what the sampler kept equals learning with a forward pass of one's own."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch
from closeness import relative_error

from polymath_fast.config import Config
from polymath_fast.errors import OutOfMemory, UserError
from polymath_fast.kernels.cpu import tiles
from polymath_fast.kernels.linear_grpo_loss.recorded import recorded_grpo_loss
from polymath_fast.learner import taped
from polymath_fast.learner.packing import TrainingRow, merge_duplicates
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner
from polymath_fast.models import read_config, resolve_model
from polymath_fast.rollout import tape_room, tile_weights
from polymath_fast.rollout.speculation import Speculation
from polymath_fast.rollout.tape import Tape
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.types import Request, SamplingOptions

FAMILIES = ["random:tiny", "random:tiny-qwen2", "random:tiny-qwen3"]
PROMPTS = [(5, 9, 17, 33, 70), (8, 21)]
STOP = range(2, 10)  # ends most completions early, some at once


@pytest.fixture(autouse=True)
def tiles_of_either_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "available", lambda dtype: True)


def policy_of(family: str, dtype: torch.dtype) -> Policy:
    return Policy(resolve_model(family, notify=lambda text: None), dtype=dtype)


def sampled(
    policy: Policy,
    tape: Tape,
    *,
    prompts=PROMPTS,
    n=24,
    length=30,
    temperature=1.0,
    stop=STOP,
    **options,
) -> list[TrainingRow]:
    """Completions of all prompts, with advantages, in the order in which they finish."""
    engine = TransformersEngine(policy, stop_token_ids=stop, tape=tape, **options)
    sampling = SamplingOptions(max_completion_length=length, temperature=temperature, seed=3)
    requests = [Request(prompt_ids=prompt, n=n) for prompt in prompts]
    rows = []
    for number, _, completion in engine.stream(requests, sampling):
        rows.append(
            TrainingRow(
                prompt_ids=prompts[number],
                token_ids=completion.token_ids,
                sampling_logprobs=completion.sampling_logprobs,
                advantage=(-1.0, 0.5, 1.5)[len(rows) % 3],
                recorded=completion.recorded,
            )
        )
    return rows


def recording(rows: int) -> Tape:
    tape = Tape(rows)
    tape.start_step()
    return tape


def update(policy: Policy, rows: list[TrainingRow], **settings) -> tuple[dict, torch.Tensor]:
    """Metrics and gradient of one update of a learner with the weights of `policy`."""
    own = Policy(policy.model_dir, dtype=policy.head.weight.dtype)
    own.model.load_state_dict(policy.model.state_dict())
    settings = {"tokens_per_microbatch": 120} | settings
    learner = Learner(own, Config(max_completion_length=30, **settings))
    seen, step = {}, learner.optimizer.step

    def spied(rate: float):
        seen["gradient"] = learner.optimizer.grad.clone()
        return step(0.0)

    learner.optimizer.step = spied
    return learner.update(rows, 0), seen["gradient"]


def plain(rows: list[TrainingRow]) -> list[TrainingRow]:
    return [replace(row, recorded=None) for row in rows]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each pass over a tape."""
    seen, init = [], taped.TapedPass.__init__
    monkeypatch.setattr(
        taped.TapedPass,
        "__init__",
        lambda self, policy, rows, *more: (seen.append(len(rows)), init(self, policy, rows, *more))[
            1
        ],
    )
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [30, 1024])
@pytest.mark.parametrize("tree", ["off", "on"])
def test_float32_gradients_are_those_of_a_forward_pass(family, tokens, tree, passes):
    policy = policy_of(family, torch.float32)
    rows = sampled(policy, recording(2000))
    assert all(row.recorded is not None for row in rows)
    settings = {"tokens_per_microbatch": tokens, "prefix_tree": tree}
    metrics, gradient = update(policy, rows, **settings)
    assert sum(passes) == len(rows) and (tokens == 30) == (len(passes) > len(PROMPTS))
    expected, truth = update(policy, plain(rows), **settings)
    assert len(passes) and relative_error(gradient, truth) < 1e-5
    assert metrics["policy/loss"] == pytest.approx(expected["policy/loss"], abs=1e-6)
    assert metrics["policy/entropy"] == pytest.approx(expected["policy/entropy"], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_gradients_are_as_near_to_the_truth(family):
    """The truth is the same weights in float32; both passes round, in places of their own."""
    policy = policy_of(family, torch.bfloat16)
    rows = sampled(policy, recording(2000))
    found = update(policy, rows)[1]
    own = update(policy, plain(rows))[1]
    exact = policy_of(family, torch.float32)
    exact.model.load_state_dict(policy.model.state_dict())
    truth = update(exact, plain(rows))[1]
    assert relative_error(found, truth) < 1.2 * relative_error(own, truth) < 0.2


@pytest.mark.parametrize(
    ("tape", "settings", "kept"),
    [
        ({}, {}, True),
        ({}, {"loss_type": "gspo"}, True),
        ({}, {"active_vocabulary": "auto"}, True),
        ({}, {"temperature": 0.7}, False),
        ({}, {"entropy_coef": 0.01}, False),
        ({"predictions": False}, {}, False),
    ],
)
def test_the_loss_reads_what_tokens_were_drawn_from(tape, settings, kept, monkeypatch):
    """Where that is what it needs; elsewhere it computes logits from the tape's last states."""
    called = []

    def spied(*args, **more):
        called.append(args)
        return recorded_grpo_loss(*args, **more)

    # by its name, for the package has an operator of the same one
    module = sys.modules["polymath_fast.kernels.linear_grpo_loss.recorded"]
    monkeypatch.setattr(module, "recorded_grpo_loss", spied)
    policy = policy_of("random:tiny", torch.float32)
    recorder = Tape(2000, **tape)
    recorder.start_step()
    rows = sampled(policy, recorder)
    metrics, gradient = update(policy, rows, **settings)
    assert bool(called) == kept and metrics["packing/taped_ratio"] == 1
    expected, truth = update(policy, plain(rows), **settings)
    assert relative_error(gradient, truth) < 1e-5
    assert metrics["policy/loss"] == pytest.approx(expected["policy/loss"], abs=1e-6)
    assert metrics["policy/entropy"] == pytest.approx(expected["policy/entropy"], rel=1e-5)


def test_two_updates_are_equal_bit_for_bit():
    policy = policy_of("random:tiny", torch.bfloat16)
    rows = sampled(policy, recording(2000))
    assert torch.equal(update(policy, rows)[1], update(policy, rows)[1])


def test_greedy_completions_are_one_row_of_the_tape(passes):
    """Duplicates are merged whoever recorded them, also where only some are recorded."""
    policy = policy_of("random:tiny", torch.float32)
    rows = sampled(policy, recording(40), temperature=0, n=6, prompts=PROMPTS[:1])
    rows = [replace(row, advantage=0.7) for row in rows]
    assert relative_error(update(policy, rows)[1], update(policy, plain(rows))[1]) < 1e-5
    assert passes == [1]


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


def test_drafts_that_were_wrong_leave_no_trace(passes):
    policy = policy_of("random:tiny", torch.float32)
    speculation = Speculation(5, rows=96)
    truth = sampled(policy, Tape())
    for prompt in PROMPTS:
        known = [row.token_ids for row in truth if row.prompt_ids == prompt]
        speculation.history.add(prompt, known * 3)
    rows = sampled(policy, recording(4000), speculation=speculation)
    assert speculation._counts["drafted"] > speculation._counts["accepted"] > 10
    assert all(row.recorded is not None for row in rows)
    assert relative_error(update(policy, rows)[1], update(policy, plain(rows))[1]) < 1e-5
    assert sum(passes) == len(rows)


def test_a_tape_that_drafts_fill_early_keeps_what_it_has(passes):
    policy = policy_of("random:tiny", torch.float32)
    speculation = Speculation(8, rows=96)
    for prompt in PROMPTS:
        speculation.history.add(prompt, [[40 + i % 3 for i in range(60)]] * 3)
    rows = sampled(policy, recording(300), speculation=speculation)
    assert relative_error(update(policy, rows)[1], update(policy, plain(rows))[1]) < 1e-5
    assert len(rows) > sum(passes) == sum(row.recorded is not None for row in rows) > 0


def test_a_lent_gradient_changes_no_bit():
    """The sampler works where the gradient will be; before, between and after updates."""
    found = []
    for lends in (False, True):
        policy, tape = policy_of("random:tiny", torch.bfloat16), Tape(2000)
        learner = Learner(policy, Config(max_completion_length=30, learning_rate=1e-3), lends=lends)
        for step in range(2):
            tape.start_step()
            with learner.lend() as arena:
                rows = sampled(policy, tape)
            assert (arena is not None and arena.most > 0) == lends
            rows = [
                replace(row, recorded=row.recorded._replace(weight_version=step)) for row in rows
            ]
            learner.update(rows, step)
        found.append(([row.token_ids for row in rows], learner.optimizer.live.clone()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_prompts_with_few_rows_learn_side_by_side(passes):
    policy, prompts = policy_of("random:tiny", torch.float32), [*PROMPTS, (11, 12, 13)]
    tape = recording(2000)
    rows = sampled(policy, tape, prompts=prompts, n=4) + sampled(policy, tape, prompts=prompts[:1])
    many = sum(len(row.token_ids) - 1 for row in rows if row.prompt_ids == prompts[0])
    few = max(
        sum(len(row.token_ids) - 1 for row in rows if row.prompt_ids == prompt)
        for prompt in prompts[1:]
    )
    found = update(policy, rows, tokens_per_microbatch=4 * (few + 1))[1]
    ours = [row for row in rows if row.prompt_ids == prompts[0]]
    assert few < many and passes == [len(merge_duplicates(ours))]
    assert relative_error(found, update(policy, plain(rows), tokens_per_microbatch=1024)[1]) < 1e-5


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
    told = r"(\d+) tokens .* is 40, 8 times that from the tape\).*--tape-gib 0 or (--\S+ 35)"
    with pytest.raises(OutOfMemory, match=told) as raised:
        learner.update(rows, 0)
    assert 280 < int(re.search(told, str(raised.value))[1]) <= 320


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
