"""Drafts from history in the real vLLM: what is sampled is still the model's distribution."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from polymath_fast import rollout
from polymath_fast.errors import UserError
from polymath_fast.learner.policy import Policy
from polymath_fast.rollout import vllm_process
from polymath_fast.rollout.speculation import Speculation
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.types import SamplingOptions
from polymath_fast.rollout.vllm_speculation import HistoryProposer

PROMPT, OTHER = [5, 9, 17, 33, 70], [8, 21]
STOP = [45, 262]
TEMPERATURE = 0.7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def policy(tiny_model):
    return Policy(tiny_model, device=DEVICE, dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(tiny_model):
    from polymath_fast.rollout.vllm_engine import VllmEngine

    made = VllmEngine(
        tiny_model, stop_token_ids=STOP, device=DEVICE, dtype="float32", max_model_len=60,
        max_num_seqs=256, kv_cache_gib=1, threads=1, speculation=Speculation(4, rows=2048),
    )  # fmt: skip
    yield made
    made.close()


@pytest.fixture
def speculation(engine):
    """The engine's, with nothing in it."""
    fresh = engine._speculation
    fresh.history.load({})
    fresh.start_step()
    return fresh


def truth_of(policy, tokens):
    """(length, V) log-probs of what follows the prompt and each of `tokens`."""
    from polymath_fast.rollout.decode import PromptCache, run_decoder

    ids = torch.tensor([[*PROMPT, *tokens]], device=DEVICE)
    positions = torch.arange(ids.shape[1], device=DEVICE)[None]
    with torch.inference_mode():
        logits = policy.head(run_decoder(policy, ids, positions, PromptCache())[0])
    return (logits.double() / TEMPERATURE).log_softmax(-1)[len(PROMPT) - 1 :].cpu()


@pytest.mark.vllm
@pytest.mark.parametrize("rank", [0, 2, -1])
def test_tokens_after_a_draft_follow_the_model(engine, policy, speculation, rank):
    """The most likely token, the third and the least likely one are drafted after a first token
    that is common; they come as often as the model says, with its log-probs."""
    first = int(truth_of(policy, [])[0].argmax())
    expected = truth_of(policy, [first])[1].exp().numpy()
    drafted = int(np.argsort(-expected)[rank])
    speculation.history.add(PROMPT, [[first, drafted, 7, 8]] * 5000)
    chosen = []
    for seed in range(8):
        sampling = SamplingOptions(max_completion_length=5, temperature=TEMPERATURE, seed=seed)
        chosen += engine.generate(PROMPT, 250, sampling)
    chosen = [c for c in chosen if c.token_ids[0] == first and len(c.token_ids) > 1]
    assert speculation._counts["drafted"] > len(chosen) > 1000
    seen = np.bincount([c.token_ids[1] for c in chosen], minlength=len(expected))
    expected = expected * len(chosen)
    often = expected >= 8
    cells = [(seen[often], expected[often]), (seen[~often].sum(), expected[~often].sum())]
    chi = sum(float(np.sum((a - b) ** 2 / b)) for a, b in cells)
    freedom = int(often.sum())
    assert chi < freedom + 5 * math.sqrt(2 * freedom)  # 5 deviations of a chi-square variable
    for completion in chosen[:40]:
        every = truth_of(policy, completion.token_ids[:-1])
        truth = every.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        found = torch.tensor(completion.sampling_logprobs, dtype=torch.float64)
        torch.testing.assert_close(found, truth, atol=1e-4, rtol=0)


@pytest.mark.vllm
@pytest.mark.parametrize("limit", [1, 2, 7, 40])
@pytest.mark.parametrize("right", [True, False])
def test_greedy_completions_are_the_embedded_samplers(engine, policy, speculation, limit, right):
    """Right drafts run over stop tokens and the length limit; wrong ones change nothing."""
    sampling = SamplingOptions(max_completion_length=limit, temperature=0)
    longest = SamplingOptions(max_completion_length=48, temperature=0)
    truth = TransformersEngine(policy, stop_token_ids=STOP)
    unstopped = TransformersEngine(policy, stop_token_ids=[])
    for prompt in (PROMPT, OTHER):
        whole = list(unstopped.generate(prompt, 1, longest)[0].token_ids)
        tokens = whole if right else [(token + 1) % 256 for token in whole]
        speculation.history.add(prompt, [tokens] * 50)
    found = engine.generate_many([PROMPT, OTHER], 1, sampling)
    for ours, theirs in zip(found, truth.generate_many([PROMPT, OTHER], 1, sampling), strict=True):
        assert list(ours[0].token_ids) == list(theirs[0].token_ids)
        assert ours[0].finish_reason == theirs[0].finish_reason
        torch.testing.assert_close(
            torch.tensor(ours[0].sampling_logprobs), torch.tensor(theirs[0].sampling_logprobs),
            atol=1e-4, rtol=0,
        )  # fmt: skip
    counts = speculation._counts
    if limit == 40 and right:
        assert counts["drawn"] / counts["verified"] > 3
        assert counts["accepted"] <= counts["drafted"]


@pytest.mark.vllm
def test_the_same_history_draws_the_same(engine, speculation):
    """What a resumed run rests on: its draws depend on the drafts, so these must be the same."""
    sampling = SamplingOptions(max_completion_length=30, temperature=TEMPERATURE, seed=3)
    known = [c.token_ids for c in engine.generate(PROMPT, 8, sampling)]
    speculation.history.add(PROMPT, known * 50)
    saved = {name: tensor.clone() for name, tensor in speculation.tensors().items()}
    first = engine.generate(PROMPT, 8, sampling)
    assert speculation._counts["accepted"] > 0
    assert first != engine.generate(PROMPT, 8, replace(sampling, seed=4))
    speculation.history.load(saved)
    assert engine.generate(PROMPT, 8, sampling) == first


def test_a_process_of_its_own_is_refused():
    with pytest.raises(UserError, match="--weight-sync alias works"):
        rollout.require_speculation("vllm", "ipc")
    rollout.require_speculation("transformers", "identity")


def test_a_version_without_the_door_is_refused(monkeypatch):
    monkeypatch.setattr(vllm_process, "find_spec", lambda name: None)
    monkeypatch.setattr(vllm_process, "check_version", lambda: "0.26.0")
    with pytest.raises(UserError, match=r"0\.26\.0 has no door .* --engine transformers"):
        rollout.require_speculation("vllm", "alias")


def test_how_drafts_did_is_counted_by_request():
    """Rows change places between passes, and a request that a pass left out is not counted."""
    speculation, names = Speculation(3, rows=64), ["a", "b"]
    proposer = HistoryProposer(None)
    proposer.attach(speculation, lambda: names, [99])
    proposer.start([PROMPT], 20)
    speculation.history.add(PROMPT, [[1, 2, 3, 4, 5, 6, 99]] * 9)

    def propose(*rows):
        """Rows of (tokens drawn before, those of this pass)."""
        texts = [[*PROMPT, *before, *new] for before, new in rows]
        table = np.zeros((4, 40), np.int32)
        for i, text in enumerate(texts):
            table[i, : len(text)] = text
        ends = np.array([*map(len, texts), 0, 0])
        return proposer.propose([new for _, new in rows], ends, table)

    assert propose(([], [1]), ([], [2])) == [[2, 3, 4], []]
    names[:] = ["b", "a"]
    # a: 2 and 3 were right, then 8 was drawn
    assert propose(([2], [9]), ([1], [2, 3, 8]))[1] == []
    assert speculation._counts == {"verified": 1, "drafted": 3, "accepted": 2, "drawn": 3}
    speculation.start_step()
    names[:] = ["a"]
    assert propose(([1, 2], [3])) == [[4, 5, 6]]
    propose(([1, 2, 3], []))  # preempted: nothing came of it
    assert not speculation._counts
    assert propose(([1, 2], [3])) == [[4, 5, 6]]
    propose(([1, 2, 3], [4, 5, 6, 99]))  # all right, and one more
    assert speculation._counts == {"verified": 1, "drafted": 3, "accepted": 3, "drawn": 4}
    speculation.start_step()
    assert propose(([1, 2, 3], [4])) == [[5, 6, 99]]
    propose(([1, 2, 3, 4], [5, 6, 99, 7]))  # the end was drafted; what follows it does not count
    assert speculation._counts == {"verified": 1, "drafted": 3, "accepted": 3, "drawn": 3}
