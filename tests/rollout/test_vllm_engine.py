"""The real vLLM in this process, on whatever device it was built for."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polymath_fast.errors import EngineError
from polymath_fast.learner.policy import Policy
from polymath_fast.precision import default_dtype
from polymath_fast.rollout import stop_token_ids
from polymath_fast.rollout.types import Request, SamplingOptions

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

QUESTIONS = ("What is 17 + 25?", "Name three colours.")


@pytest.fixture(scope="module")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def prompts(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False
        )
        for q in QUESTIONS
    ]


@pytest.fixture(scope="module")
def engine(smollm2, device):
    from polymath_fast.rollout.vllm_engine import VllmEngine

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    made = VllmEngine(
        smollm2,
        stop_token_ids=stop_token_ids(smollm2, tokenizer),
        max_model_len=256,
        max_num_seqs=16,
        device=device,
        kv_cache_gib=1,
    )
    yield made
    made.close()


def change(model):
    """Every weight moves, the tied embedding and head most of all."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(noise * 0.01 * weight.float().std().to(weight))
        model.get_input_embeddings().weight.mul_(0.7)


def forward_logprobs(model, prompt, completion, temperature):
    ids = torch.tensor([[*prompt, *completion.token_ids]], device=model.device)
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    targets = ids[0, len(prompt) :, None]
    return logits.log_softmax(-1).gather(-1, targets)[:, 0].cpu()


def test_samples_with_temperature_scaled_logprobs(engine, smollm2, prompts, device):
    sampling = SamplingOptions(max_completion_length=40, temperature=0.6, seed=3)
    groups = engine.generate_many(prompts, 6, sampling)
    assert [len(group) for group in groups] == [6, 6]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=default_dtype(device)).to(device)
    stops, differences = set(engine.stop_token_ids), []
    for prompt, group in zip(prompts, groups, strict=True):
        assert len({tuple(c.token_ids) for c in group}) > 1
        for completion in group:
            ended = completion.token_ids[-1] in stops
            assert completion.finish_reason == ("stop" if ended else "length")
            assert len(completion.token_ids) == len(completion.sampling_logprobs) <= 40
            truth = forward_logprobs(model, prompt, completion, 0.6)
            differences.append((torch.tensor(completion.sampling_logprobs) - truth).abs())
    # two bfloat16 kernels; without the division by the temperature it would be about 0.3
    assert torch.cat(differences).mean() < 0.05


def test_the_seed_decides(engine, prompts):
    def draw(seed):
        sampling = SamplingOptions(max_completion_length=16, temperature=1.0, seed=seed)
        return [list(c.token_ids) for c in engine.generate(prompts[0], 6, sampling)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_pushed_weights_are_what_it_samples_from(engine, smollm2, prompts, device):
    """After a change of the learner, log-probs are transformers' own with the same change."""
    policy = Policy(smollm2, device=device)
    change(policy.model)
    greedy = SamplingOptions(max_completion_length=12, temperature=0)
    before = engine.generate(prompts[0], 2, greedy)
    assert before[0].token_ids == before[1].token_ids
    engine.weights.push(policy.named_weights(), 7)
    after = engine.generate(prompts[0], 1, greedy)[0]
    assert (before[0].weight_version, after.weight_version) == (0, 7)
    original = AutoModelForCausalLM.from_pretrained(smollm2, dtype=default_dtype(device)).to(device)
    changed = AutoModelForCausalLM.from_pretrained(smollm2, dtype=default_dtype(device)).to(device)
    change(changed)
    found = torch.tensor(after.sampling_logprobs)
    error = (found - forward_logprobs(changed, prompts[0], after, 1.0)).abs().mean()
    distance = (found - forward_logprobs(original, prompts[0], after, 1.0)).abs().mean()
    assert error < 0.06, error
    assert distance > 3 * error
    engine.weights.push(Policy(smollm2, device=device).named_weights(), 8)
    assert engine.generate(prompts[0], 1, greedy)[0].token_ids == before[0].token_ids


def test_a_dead_engine_is_an_engine_error(engine, prompts, monkeypatch):
    def die(*args, **kwargs):
        raise RuntimeError("worker died")

    monkeypatch.setattr(engine._llm.llm_engine, "step", die)
    with pytest.raises(EngineError, match="worker died"):
        engine.generate(prompts[0], 1, SamplingOptions(max_completion_length=4))


def test_a_failure_while_a_stream_is_closed_is_an_engine_error(engine, prompts, monkeypatch):
    def die(*args, **kwargs):
        raise RuntimeError("device lost")

    request = Request(prompt_ids=prompts[1], n=8)
    stream = engine.stream([request], SamplingOptions(max_completion_length=200))
    next(stream)  # the others go on
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm.llm_engine, "step", die)
        with pytest.raises(EngineError, match="device lost"):
            stream.close()
