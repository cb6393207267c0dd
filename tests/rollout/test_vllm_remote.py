"""The real vLLM in a child process, on weights in this process's memory."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from polymath_fast.errors import EngineError
from polymath_fast.learner.policy import Policy
from polymath_fast.precision import default_dtype
from polymath_fast.rollout.remote_engine import RemoteEngine
from polymath_fast.rollout.types import Request, SamplingOptions

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def logprobs_of(model, prompt, completion):
    ids = torch.tensor([[*prompt, *completion.token_ids]], device=model.device)
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    targets = ids[0, len(prompt) :, None]
    return logits.log_softmax(-1).gather(-1, targets)[:, 0].cpu()


def test_updates_reach_an_engine_in_another_process(tiny_model, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # vLLM's short warm-up
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompt = list(b"What is 17 + 25?")
    greedy = SamplingOptions(max_completion_length=12, temperature=0)
    engine = RemoteEngine(
        tiny_model,
        device=device,
        stop_token_ids=[0],
        max_model_len=64,
        max_num_seqs=4,
        kv_cache_gib=1,
    )
    try:
        policy = Policy(tiny_model, device=device)
        storage = engine.weights.attach(policy.model)
        before = engine.generate(prompt, 1, greedy)[0]
        # a stream that nobody wants to the end: its process stops and takes the push at once
        stream = engine.stream(
            [Request(prompt_ids=prompt, n=40)], SamplingOptions(max_completion_length=40)
        )
        next(stream)
        stream.close()
        engine.weights.push(policy.named_weights(), 1)
        same = engine.generate(prompt, 1, greedy)[0]
        assert same.token_ids == before.token_ids and same.weight_version == 1
        generator = torch.Generator().manual_seed(0)
        scale = 0.01 * storage.live.float().std().item()
        noise = torch.randn(storage.live.shape, generator=generator) * scale
        storage.live.add_(noise.to(storage.live))
        policy.model.get_input_embeddings().weight.data.mul_(0.7)
        engine.weights.push(policy.named_weights(), 2)
        engine.weights.verify(policy.named_weights())
        after = engine.generate(prompt, 1, greedy)[0]
        assert after.weight_version == 2
        truth = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=default_dtype(device)).to(
            device
        )
        original = logprobs_of(truth, prompt, after)
        truth.load_state_dict({n: w.clone() for n, w in policy.named_weights()})
        found = torch.tensor(after.sampling_logprobs)
        error = (found - logprobs_of(truth, prompt, after)).abs().mean()
        assert error < 0.06, error
        assert (found - original).abs().mean() > 3 * error
        os.kill(engine._child.process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="the other process"):
            engine.generate(prompt, 1, greedy)
        # what was trained is still there
        assert storage.live.isfinite().all()
    finally:
        engine.close()
    assert engine._child.process.poll() is not None
