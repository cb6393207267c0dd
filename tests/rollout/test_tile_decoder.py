"""Decoding in tiles against the policy's own modules, token by token."""

from __future__ import annotations

import pytest
import torch

from polymath_fast.kernels.cpu import tiles
from polymath_fast.learner.policy import Policy
from polymath_fast.models import resolve_model
from polymath_fast.rollout import tile_decoder, tile_weights
from polymath_fast.rollout.decode import ModuleDecoder
from polymath_fast.rollout.speculation import Speculation
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.types import SamplingOptions

FAMILIES = ["random:tiny", "random:tiny-qwen2", "random:tiny-qwen3"]


@pytest.fixture(params=["bfloat16", "float32"], autouse=True)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Tiles of either kind, whatever is fast on this processor."""
    monkeypatch.setattr(tiles, "available", lambda dtype: True)
    return getattr(torch, request.param)


def policy_of(family: str, dtype: torch.dtype) -> Policy:
    return Policy(resolve_model(family, notify=lambda text: None), dtype=dtype)


def both(policy: Policy, lengths: list[int]):
    """The two decoders on prompts of these lengths; equal lengths are one prompt."""
    engine = TransformersEngine(policy, stop_token_ids=[2])
    known = {length: engine._prefill(list(range(3, 3 + length))) for length in set(lengths)}
    prefilled = [known[length] for length in lengths]
    weights = tile_weights.TileWeights(policy)
    return tile_decoder.TileDecoder(weights, prefilled), ModuleDecoder(policy, prefilled)


def close(found: torch.Tensor, truth: torch.Tensor) -> bool:
    """Within what two kernels of one model differ by."""
    difference = (found[:, : truth.shape[1]] - truth.float()).abs()
    rounding = 0.04 if truth.dtype == torch.bfloat16 else 1e-5
    return bool(difference.mean() < rounding * truth.float().std())


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[9] * 5, [3, 70, 9, 9]])
def test_logits_follow_the_modules(family, lengths, dtype):
    ours, theirs = both(policy_of(family, dtype), lengths)
    assert close(ours.first(), theirs.first())
    generator = torch.Generator().manual_seed(0)
    for step in range(70):  # over the edge of a panel of 64 positions
        tokens = torch.randint(3, 250, (len(lengths),), generator=generator)
        if step == 20:
            kept = torch.tensor([0, 2, 3])
            ours.keep(kept)
            theirs.keep(kept)
        if step >= 20:
            tokens = tokens[:3]
        assert close(ours.next(tokens), theirs.next(tokens)), step


@torch.inference_mode()
def test_logits_carry_no_rounding_of_the_head(dtype):
    policy = policy_of("random:tiny", dtype)
    ours, theirs = both(policy, [9])
    exact = theirs._last.double() @ policy.head.weight.double().T
    width = exact.shape[1]
    torch.testing.assert_close(ours.first()[:, :width].double(), exact, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_told(dtype, monkeypatch):
    policy = policy_of("random:tiny", dtype)
    assert tile_weights.fits(policy)
    monkeypatch.setattr(tiles, "available", lambda asked: asked != dtype)
    assert not tile_weights.fits(policy)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[9] * 5, [3, 70, 9, 9]])
def test_blocks_equal_tokens_one_by_one(family, lengths, dtype):
    """Blocks of several tokens, partly taken back, over the edges of panels."""
    policy = policy_of(family, dtype)
    (ours, _), (single, _) = both(policy, lengths), both(policy, lengths)
    texts = torch.randint(3, 250, (len(lengths), 140), generator=torch.Generator().manual_seed(0))
    vocab = len(policy.head.weight)  # what stands in the padding behind it is nobody's
    steps = (single.next(texts[:, step])[:, :vocab].clone() for step in range(140))
    truth = torch.stack(list(steps), dim=1)
    blocks, done = ours.blocks(), torch.zeros(len(lengths), dtype=torch.int64)
    for turn in range(30):
        counts = 1 + (torch.arange(len(lengths)) + turn) % 6
        kept = 1 + (counts - 1) // (1 + turn % 2)
        chosen = [(b, int(done[b]) + j) for b in range(len(lengths)) for j in range(counts[b])]
        tokens = texts[tuple(zip(*chosen, strict=True))].clone()
        first = counts.cumsum(0) - counts
        offset = torch.arange(len(tokens)) - first.repeat_interleave(counts)
        stands = offset < kept.repeat_interleave(counts)
        tokens[~stands] = 7  # a wrong draft
        found = blocks.block(tokens, counts)
        blocks.advance(kept)
        done += kept
        expected = truth[tuple(zip(*chosen, strict=True))]
        assert torch.equal(found[stands, :vocab], expected[stands]), turn
    blocks.keep(torch.tensor([1, 2]))
    counts = torch.tensor([2, 1])
    tokens = torch.stack([texts[1, done[1]], texts[1, done[1] + 1], texts[2, done[2]]])
    found = blocks.block(tokens, counts)
    expected = torch.stack([truth[1, done[1]], truth[1, done[1] + 1], truth[2, done[2]]])
    assert torch.equal(found[:, :vocab], expected)


@pytest.mark.parametrize("temperature", [0, 0.3])
def test_drafts_change_no_bit(temperature, dtype):
    """A row of a tile does not depend on the others, so even log-probs are the same."""
    policy, prompts = policy_of("random:tiny", dtype), [[5, 9, 17], [8] * 11]
    sampling = SamplingOptions(max_completion_length=40, temperature=temperature, seed=1)
    truth = TransformersEngine(policy, stop_token_ids=[2]).generate_many(prompts, 4, sampling)
    speculation = Speculation(5, rows=32)
    for prompt, group in zip(prompts, truth, strict=True):
        speculation.history.add(prompt, [completion.token_ids for completion in group] * 3)
    engine = TransformersEngine(policy, stop_token_ids=[2], speculation=speculation)
    assert engine.generate_many(prompts, 4, sampling) == truth
    assert speculation._counts["accepted"] > 10
