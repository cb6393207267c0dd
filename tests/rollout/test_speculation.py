"""With drafts or without, through the modules: the same tokens, whatever the history says.

In float32 the rounding of products of another shape is far below the distance of a uniform number
from the edge of a token's interval, so tokens are compared as they are.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polymath_fast.learner.policy import Policy
from polymath_fast.rollout import tile_weights
from polymath_fast.rollout.block_cache import BlockCache
from polymath_fast.rollout.decode import (
    ModuleBlocks,
    ModuleDecoder,
    PromptCache,
    run_decoder,
)
from polymath_fast.rollout.history import NGramTable
from polymath_fast.rollout.speculation import Speculation
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.types import Completion, Group, Request, RolloutBatch, SamplingOptions
from polymath_fast.samples import Sample

ONE, TWO = [5, 9, 17, 33, 70], [8, 21]
STOP = [2, *range(40, 60)]
LIMIT = 40


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """Tiles change no bit, which `test_tile_decoder` holds them to."""
    monkeypatch.setattr(tile_weights, "fits", lambda policy: False)


@pytest.fixture(scope="module")
def policy(tiny_model):
    return Policy(tiny_model, dtype=torch.float32)


def sample(policy, speculation, *, prompts=(ONE,), n=6, temperature=1.0, seed=0, limit=LIMIT,
           stop=STOP, max_num_seqs=64):  # fmt: skip
    engine = TransformersEngine(
        policy, stop_token_ids=stop, max_num_seqs=max_num_seqs, speculation=speculation
    )
    sampling = SamplingOptions(max_completion_length=limit, temperature=temperature, seed=seed)
    found = [{} for _ in prompts]
    # each of them decodes, while generate_many would draw equal ones once
    for drawn in engine.stream([Request(prompt_ids=ids, n=n) for ids in prompts], sampling):
        found[drawn.request][drawn.index] = drawn.completion
    return [[each[i] for i in range(n)] for each in found]


def assert_same(found, truth, temperature=1.0):
    for ours, theirs in zip(sum(found, []), sum(truth, []), strict=True):
        assert list(ours.token_ids) == list(theirs.token_ids)
        assert ours.finish_reason == theirs.finish_reason
        torch.testing.assert_close(
            torch.tensor(ours.sampling_logprobs), torch.tensor(theirs.sampling_logprobs),
            atol=2e-5 / (temperature or 1), rtol=0,
        )  # fmt: skip


def as_batch(prompts, groups):
    """The completions as one step's rollouts."""
    made = []
    for prompt, completions in zip(prompts, groups, strict=True):
        asked = Sample("", "", "", tuple(prompt), {})
        made.append(Group(sample=asked, completions=completions))
    return RolloutBatch(groups=made)


class Remembering(Speculation):
    """Drafts what it was told, whatever the completions are."""

    def __init__(self, completion, most):
        super().__init__(most, rows=2 * LIMIT * 3)
        self.history.add(ONE, [completion] * 50)  # surer than anything seen since


@pytest.mark.parametrize("temperature", [0, 0.3, 1.0])
@pytest.mark.parametrize("prompts", [(ONE,), (ONE, TWO)])
def test_drafts_change_no_token(policy, temperature, prompts):
    """Three seeds; each asked with a fresh history, then with one that knows every completion."""
    for seed in range(3):
        options = {"prompts": prompts, "temperature": temperature, "seed": seed}
        truth = sample(policy, None, **options)
        speculation = Speculation(5, rows=40)
        assert_same(sample(policy, speculation, **options), truth, temperature)
        speculation.end_step(as_batch(prompts, truth))
        speculation.start_step()
        assert_same(sample(policy, speculation, **options), truth, temperature)
        metrics = speculation.metrics(as_batch(prompts, truth))
        assert metrics["speculation/drafted"] > 0
        assert metrics["speculation/acceptance_length"] > 1.1


@pytest.mark.parametrize("prompts", [(ONE,), (ONE, TWO)])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_history_that_is_always_wrong_changes_no_token(policy, prompts, temperature, monkeypatch):
    """It knows every completion and says another token each time."""
    truth = sample(policy, None, prompts=prompts, temperature=temperature)
    find = NGramTable.find

    def lie(self, level, keys):
        tokens, shares = find(self, level, keys)
        return np.where(shares > 0, (tokens + 1) % 256, tokens), shares

    monkeypatch.setattr(NGramTable, "find", lie)
    for most in (1, 7):
        speculation = Speculation(most, rows=64)
        speculation.end_step(as_batch(prompts, truth))
        found = sample(policy, speculation, prompts=prompts, temperature=temperature)
        assert_same(found, truth, temperature)
        metrics = speculation.metrics(as_batch(prompts, truth))
        assert metrics["speculation/drafted"] > 20
        assert metrics["speculation/accepted_ratio"] < 0.05


def test_a_stop_token_inside_a_block_ends_the_completion(policy):
    """The stop token is drafted, is right, and what was drafted after it does not count."""
    truth = sample(policy, None, n=1, temperature=0, stop=[2])[0][0]
    cut = next(i for i in range(3, LIMIT) if truth.token_ids[i] not in truth.token_ids[:i])
    stop = [truth.token_ids[cut]]
    speculation = Remembering(truth.token_ids, LIMIT)
    found = sample(policy, speculation, n=2, temperature=0, stop=stop)
    assert_same(found, sample(policy, None, n=2, temperature=0, stop=stop))
    for completion in found[0]:
        assert list(completion.token_ids) == list(truth.token_ids[: cut + 1])
        assert completion.finish_reason == "stop"
    # All was right up to the stop token, in one pass: the block held it and tokens behind it.
    assert speculation._counts["verified"] == 2
    assert speculation._counts["accepted"] == 2 * cut
    assert speculation._counts["drafted"] > 2 * cut


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 17])
def test_the_length_limit_inside_a_block_ends_the_completion(policy, limit):
    truth = sample(policy, None, n=3, temperature=0, stop=[2])
    speculation = Remembering(truth[0][0].token_ids, LIMIT)
    found = sample(policy, speculation, n=3, temperature=0, stop=[2], limit=limit)
    for completion, whole in zip(found[0], truth[0], strict=True):
        assert list(completion.token_ids) == list(whole.token_ids[:limit])
        assert completion.finish_reason == "length"
    # The first token is drawn before anything is drafted, the last one after all that is.
    assert speculation._counts["drafted"] == 3 * max(0, limit - 2)


def test_completions_of_one_call_are_history_for_the_next_wave(policy):
    speculation = Speculation(5, rows=8)
    options = {"n": 12, "temperature": 0, "max_num_seqs": 4}
    assert_same(sample(policy, speculation, **options), sample(policy, None, **options), 0)
    assert speculation._counts["drafted"] > 100
    assert speculation._counts["accepted"] > 0.9 * speculation._counts["drafted"]
    assert speculation.history.num_tokens == 0  # evaluations leave no trace from step to step


def test_many_completions_decode_in_lock_step_first(policy, monkeypatch):
    """Nothing is drafted before few are left; from there on no pass is larger than allowed."""
    sizes = []
    block = ModuleBlocks.block

    def noted(self, tokens, counts):
        sizes.append((len(counts), len(tokens)))
        return block(self, tokens, counts)

    monkeypatch.setattr(ModuleBlocks, "block", noted)
    speculation = Speculation(6, rows=10)
    options = {"n": 20, "temperature": 0.3, "seed": 2, "limit": 64}
    assert_same(sample(policy, speculation, **options), sample(policy, None, **options), 0.3)
    assert sizes and all(live <= 5 and rows <= 10 for live, rows in sizes)
    assert any(rows > live for live, rows in sizes)


def test_a_restored_history_gives_the_same_bits(policy):
    """Not only the tokens: blocks have the same shapes, so log-probs round the same."""
    speculation, resumed = Speculation(5, rows=16), Speculation(5, rows=16)
    speculation.end_step(as_batch([ONE], sample(policy, None, temperature=0.3, seed=7)))
    resumed.load({name: tensor.clone() for name, tensor in speculation.tensors().items()})
    straight = sample(policy, speculation, temperature=0.3, seed=8)
    assert sample(policy, resumed, temperature=0.3, seed=8) == straight
    assert resumed._counts == speculation._counts and speculation._counts["drafted"] > 0


def test_metrics_by_hand():
    speculation = Speculation(4)
    speculation.count(drafted=4, accepted=4, drawn=5)
    speculation.count(drafted=3, accepted=0, drawn=1)
    speculation.count(drafted=0, accepted=0, drawn=1)  # nothing was drafted: no verification
    batch = as_batch([ONE], sample_of(20))
    assert speculation.metrics(batch) == {
        "speculation/drafted": 7,
        "speculation/acceptance_length": 3.0,
        "speculation/accepted_ratio": 4 / 7,
        "speculation/saved_ratio": 4 / 20,
    }
    speculation.start_step()
    assert speculation.metrics(batch) == {
        "speculation/drafted": 0, "speculation/saved_ratio": 0.0,
    }  # fmt: skip


def sample_of(length):
    zeros = [0] * length
    return [[Completion(token_ids=zeros, sampling_logprobs=zeros, finish_reason="stop",
                        weight_version=0)]]  # fmt: skip


def test_switched_off_it_remembers_nothing():
    speculation = Speculation(0)
    assert not speculation.begins(1)
    batch = as_batch([ONE], sample_of(3))
    speculation.end_step(batch)
    assert speculation.metrics(batch) == {}
    assert speculation.tensors() == {} and speculation.history.num_tokens == 0


@torch.inference_mode()
@pytest.mark.parametrize("prompts", [[ONE] * 3, [ONE, TWO, ONE]])
def test_logits_of_blocks_equal_a_forward_pass(policy, prompts):
    """Blocks of other lengths in each completion, partly taken back, against whole sequences."""
    engine = TransformersEngine(policy, stop_token_ids=STOP)
    known = {tuple(prompt): engine._prefill(prompt) for prompt in prompts}
    prefilled = [known[tuple(prompt)] for prompt in prompts]
    decoder = ModuleDecoder(policy, prefilled)
    texts = torch.randint(3, 250, (3, 120), generator=torch.Generator().manual_seed(1)).tolist()
    decoder.next(torch.tensor([text[0] for text in texts]))
    blocks, done = decoder.blocks(), [1, 1, 1]
    assert isinstance(blocks._cache, BlockCache)
    for turn in range(20):
        if turn == 12:
            blocks.keep(torch.tensor([0, 2]))
            prompts, texts, done = [[x[0], x[2]] for x in (prompts, texts, done)]
        counts = [1 + (turn + row) % 4 for row in range(len(texts))]
        kept = [max(1, count - turn % 2) for count in counts]
        rows = [
            (texts[b][done[b] + j] if j < kept[b] else 7)
            for b in range(len(texts)) for j in range(counts[b])
        ]  # fmt: skip
        logits = blocks.block(torch.tensor(rows), torch.tensor(counts))
        blocks.advance(torch.tensor(kept))
        for b, prompt in enumerate(prompts):
            first, end = sum(counts[:b]), done[b] + kept[b]
            truth = whole_pass(policy, engine, [*prompt, *texts[b][:end]])[-kept[b] :]
            torch.testing.assert_close(
                logits[first : first + kept[b]], truth, atol=1e-4, rtol=0, msg=f"{turn} {b}"
            )
            done[b] = end


def whole_pass(policy, engine, ids):
    """(T, V) logits of one sequence."""
    tokens = torch.tensor([ids])
    positions = torch.arange(len(ids))[None]
    return policy.head(run_decoder(policy, tokens, positions, PromptCache())[0])
