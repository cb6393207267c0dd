"""The embedded sampler against transformers' own generate and forward."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from polymath_fast.learner.policy import Policy
from polymath_fast.rollout import tile_weights
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.types import SamplingOptions

PROMPTS = [[5, 9, 17, 33, 70], [8, 21], [100] * 11]
STOP = [2, *range(40, 60)]


@pytest.fixture(params=["tiles", "modules"], autouse=True)
def decoder(request, monkeypatch):
    """Tiles wherever the processor has them, else, and on a GPU, the policy's modules."""
    monkeypatch.setattr(tile_weights, "fits", lambda policy: request.param == "tiles")


@pytest.fixture(scope="module")
def models(tiny_model):
    policy = Policy(tiny_model, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return policy, plain


def logprobs_by_forward(plain, prompt, completion, temperature):
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    with torch.no_grad():
        logits = plain(ids).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("max_num_seqs", [1, 2, 64])
def test_greedy_equals_generate(models, max_num_seqs):
    policy, plain = models
    engine = TransformersEngine(policy, stop_token_ids=STOP, max_num_seqs=max_num_seqs)
    sampling = SamplingOptions(max_completion_length=24, temperature=0)
    found = engine.generate_many(PROMPTS, 1, sampling)
    for prompt, group in zip(PROMPTS, found, strict=True):
        expected = plain.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=STOP,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert list(group[0].token_ids) == expected
        stopped = expected[-1] in STOP
        assert group[0].finish_reason == ("stop" if stopped else "length")


@pytest.mark.parametrize(("prompts", "n"), [(PROMPTS[:1], 20), (PROMPTS, 3), (PROMPTS, 17)])
def test_logprobs_equal_a_forward_pass(models, prompts, n):
    policy, plain = models
    engine = TransformersEngine(policy, stop_token_ids=STOP, max_num_seqs=16)
    sampling = SamplingOptions(max_completion_length=70, temperature=0.7, seed=1)
    groups = engine.generate_many(prompts, n, sampling)
    assert [len(group) for group in groups] == [n] * len(prompts)
    lengths = {len(c.token_ids) for group in groups for c in group}
    assert len(lengths) > 3  # completions really end at different times
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            truth = logprobs_by_forward(plain, prompt, completion, 0.7)
            found = torch.tensor(completion.sampling_logprobs, dtype=torch.float64)
            torch.testing.assert_close(found, truth, atol=1e-4, rtol=0)
            assert all(token not in STOP for token in completion.token_ids[:-1])


def test_the_seed_decides(models):
    engine = TransformersEngine(models[0], stop_token_ids=STOP)

    def draw(seed):
        sampling = SamplingOptions(max_completion_length=12, seed=seed)
        return [c.token_ids for c in engine.generate(PROMPTS[0], 8, sampling)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert len({tuple(ids) for ids in draw(3)}) > 1


def test_samples_from_the_weights_as_they_are_now(tiny_model):
    policy = Policy(tiny_model, dtype=torch.float32)
    engine = TransformersEngine(policy, stop_token_ids=STOP)
    sampling = SamplingOptions(max_completion_length=8, temperature=0)
    before = engine.generate(PROMPTS[0], 1, sampling)[0]
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(-0.5)
    engine.weights.push(policy.named_weights(), 1)
    after = engine.generate(PROMPTS[0], 1, sampling)[0]
    assert before.token_ids != after.token_ids
    assert (before.weight_version, after.weight_version) == (0, 1)
