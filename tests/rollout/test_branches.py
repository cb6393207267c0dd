"""Completions that begin alike are one row of the decoder, and draw what they would draw alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from polymath_fast.kernels.cpu import tiles
from polymath_fast.learner.policy import Policy
from polymath_fast.models import resolve_model
from polymath_fast.rollout import tile_decoder, transformers_engine
from polymath_fast.rollout.branches import Branches
from polymath_fast.rollout.speculation import Speculation
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.types import Request, SamplingOptions

ONE, TWO = (5, 9, 17, 33, 70), (8, 21)


@pytest.fixture(autouse=True)
def tiles_of_either_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "available", lambda dtype: True)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each pass of the decoder."""
    seen, block = [], tile_decoder.TileDecoder.block

    def counted(self, tokens, counts):
        seen.append(len(tokens))
        return block(self, tokens, counts)

    monkeypatch.setattr(tile_decoder.TileDecoder, "block", counted)
    return seen


def sampled(policy: Policy, requests, monkeypatch: pytest.MonkeyPatch, *, apart: bool, **options):
    temperature, length = options.pop("temperature", 0.5), options.pop("length", 90)
    engine = TransformersEngine(policy, stop_token_ids=range(2, 6), **options)
    sampling = SamplingOptions(max_completion_length=length, temperature=temperature, seed=1)
    with monkeypatch.context() as patched:
        if apart:
            patched.setattr(
                transformers_engine,
                "Branches",
                lambda prefixes, apart: Branches(prefixes, apart=True),
            )
        return list(engine.stream(requests, sampling))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("drop_below", [1.0, 0.5])
def test_every_row_has_read_what_its_completions_drew(apart, drop_below):
    generator = torch.Generator().manual_seed(0)
    branches = Branches([ONE, TWO, ONE, ONE, TWO, ONE] * 5, apart=apart)
    read = list(branches.starts)  # by each row of the decoder
    drawn = [list(ONE if i % 6 in (0, 2, 3, 5) else TWO) for i in range(30)]
    most, fewest = 0, 30
    for _ in range(12):
        ended = torch.rand(len(branches.completions), generator=generator) < 0.1
        branches.drop(ended)
        tokens = torch.randint(0, 2, (len(branches.completions),), generator=generator)
        for completion, token in zip(branches.completions.tolist(), tokens.tolist(), strict=True):
            drawn[completion].append(token)
        parents, fed = branches.grow(tokens, drop_below)
        if parents is not None:
            read = [read[parent] for parent in parents]
        read = [(*before, token) for before, token in zip(read, fed.tolist(), strict=True)]
        assert len(read) == branches.count
        for completion, row in zip(
            branches.completions.tolist(), branches.rows.tolist(), strict=True
        ):
            assert read[row] == tuple(drawn[completion])
        live = [drawn[i] for i in branches.completions.tolist()]
        if not apart:
            assert branches.count == len({tuple(each) for each in live})
            firsts = [live.index(list(each)) for each in read]
            assert firsts == sorted(firsts)
        most, fewest = max(most, branches.count), min(fewest, branches.count)
    assert most > fewest
    parents = branches.split()
    assert branches.rows.tolist() == list(range(branches.count)) == list(range(len(parents)))
    assert [read[parent] for parent in parents] == [tuple(each) for each in live]


@pytest.mark.parametrize("family", ["random:tiny", "random:tiny-qwen2", "random:tiny-qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("prompts", "n", "max_num_seqs"), [([ONE], 40, 64), ([ONE, TWO], 20, 12), ([ONE, TWO], 8, 64)]
)
def test_no_draw_changes(family, dtype, prompts, n, max_num_seqs, rows, monkeypatch):
    policy = Policy(resolve_model(family, notify=lambda text: None), dtype=dtype)
    requests = [Request(prompt_ids=prompt, n=n) for prompt in prompts]
    sample = partial(sampled, policy, requests, monkeypatch, max_num_seqs=max_num_seqs)
    found = sample(apart=False)
    shared = sum(rows)
    assert found == sample(apart=True)
    assert shared < sum(rows) - shared
    assert len({tuple(done.token_ids) for *_, done in found}) > 1


def test_greedy_completions_are_computed_once(rows, monkeypatch):
    policy = Policy(resolve_model("random:tiny", notify=lambda text: None), dtype=torch.float32)
    requests = [Request(prompt_ids=ONE, n=30)]
    found = sampled(policy, requests, monkeypatch, apart=False, temperature=0)
    assert set(rows) == {1}
    assert found == sampled(policy, requests, monkeypatch, apart=True, temperature=0)
    assert set(rows[len(rows) // 2 :]) == {30}


def test_drafts_take_over_from_branches(monkeypatch):
    policy = Policy(resolve_model("random:tiny", notify=lambda text: None), dtype=torch.float32)
    requests = [Request(prompt_ids=ONE, n=20), Request(prompt_ids=TWO, n=20)]
    truth = sampled(policy, requests, monkeypatch, apart=True, temperature=0.1)
    speculation = Speculation(4, rows=24)
    for prompt in (ONE, TWO):
        known = [
            done.token_ids for number, _, done in truth if requests[number].prompt_ids == prompt
        ]
        speculation.history.add(prompt, known)
    options = {"temperature": 0.1, "speculation": speculation}
    found = sampled(policy, requests, monkeypatch, apart=False, **options)
    assert sorted(found, key=lambda each: each[:2]) == sorted(truth, key=lambda each: each[:2])
    assert speculation._counts["accepted"] > 10


def test_what_was_begun_alike_goes_on_as_one(rows, monkeypatch):
    policy = Policy(resolve_model("random:tiny", notify=lambda text: None), dtype=torch.float32)
    few = {"temperature": 0.1, "length": 3}
    begun = sampled(policy, [Request(prompt_ids=ONE, n=6)], monkeypatch, apart=False, **few)
    parts = tuple(done for *_, done in begun if done.finish_reason == "length")
    assert len(parts) > len({tuple(part.token_ids) for part in parts})
    rows.clear()
    more = [Request(prompt_ids=ONE, n=len(parts), begun=parts)]
    found = sampled(policy, more, monkeypatch, apart=False)
    shared = sum(rows)
    assert found == sampled(policy, more, monkeypatch, apart=True) and shared < sum(rows) - shared


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_completion_left_in_its_place_reaches_nobody(dtype):
    policy = Policy(resolve_model("random:tiny", notify=lambda text: None), dtype=dtype)
    prefilled = [TransformersEngine(policy, stop_token_ids=[2])._prefill((3, 4, 5))]
    weights = tile_decoder.TileWeights(policy)
    found = []
    for left in (0.0, float("nan")):
        decoder = tile_decoder.TileDecoder(weights, prefilled, tokens=90, most=2)
        decoder._cache._values[:, 1].view(dtype).fill_(left)
        for step in range(75):
            if step == 5:
                decoder.keep(torch.tensor([0, 0]))
            logits = decoder.next(torch.full((1 + (step >= 5),), 7 + step))
        found.append(logits[:, :256].clone())
    assert found[0].isfinite().all() and torch.equal(*found)


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [[9], [70, 3]])
def test_rows_part_beyond_the_room_they_began_with(lengths):
    """A copy goes on as the original would, whatever becomes of that."""
    policy = Policy(resolve_model("random:tiny", notify=lambda text: None), dtype=torch.bfloat16)
    engine = TransformersEngine(policy, stop_token_ids=[2])
    weights = tile_decoder.TileWeights(policy)
    prefilled = [engine._prefill(tuple(range(3, 3 + length))) for length in lengths]
    ours = tile_decoder.TileDecoder(weights, prefilled)
    history = [[prefix] for prefix in range(len(lengths))]
    generator = torch.Generator().manual_seed(0)
    for step in range(70):
        if step % 9 == 8:
            parents = torch.randint(0, len(history), (len(history) + 4,), generator=generator)
            ours.keep(parents)
            history = [list(history[parent]) for parent in parents]
        tokens = torch.randint(3, 250, (len(history),), generator=generator)
        for past, token in zip(history, tokens.tolist(), strict=True):
            past.append(token)
        found = ours.next(tokens).clone()
    for past, logits in zip(history, found, strict=True):
        alone = tile_decoder.TileDecoder(weights, prefilled)
        alone.keep(torch.tensor(past[:1]))
        for token in past[1:]:
            expected = alone.next(torch.tensor([token]))
        assert torch.equal(logits[:256], expected[0, :256])
