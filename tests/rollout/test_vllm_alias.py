"""Learner and vLLM on one memory, with the real engine and small random models."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from polymath_fast.config import Config
from polymath_fast.errors import EngineError, UserError
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner
from polymath_fast.models import resolve_model
from polymath_fast.precision import default_dtype
from polymath_fast.rollout.types import SamplingOptions

pytestmark = pytest.mark.vllm

SHAPE = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 192, "vocab_size": 301, "initializer_range": 0.2,
    "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES = {
    "qwen2, tied, biases": {"model_type": "qwen2", "hidden_size": 128, "tie_word_embeddings": True},
    "qwen3, untied, head norms": {
        "model_type": "qwen3", "hidden_size": 64, "head_dim": 32, "tie_word_embeddings": False,
    },
}  # fmt: skip
PROMPT = [5, 9, 17, 33, 70]
GREEDY = SamplingOptions(max_completion_length=10, temperature=0)


def start(model_dir, **options):
    from polymath_fast.rollout.vllm_engine import VllmEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {
        "stop_token_ids": [2],
        "max_model_len": 128,
        "max_num_seqs": 16,
        "kv_cache_gib": 1,
        "threads": 1,
    }
    return VllmEngine(model_dir, device=device, **settings | {"weight_sync": "alias"} | options)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """An engine and a learner on its memory; all tests but the last leave them in agreement."""
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(SHAPE | FAMILIES[request.param]))
    model_dir = resolve_model(f"random:{folder}", notify=lambda text: None)
    engine = start(model_dir)
    policy = Policy(model_dir, device="cuda" if torch.cuda.is_available() else "cpu")
    config = Config(learning_rate=3e-3, max_completion_length=16)
    learner = Learner(policy, config, storage=engine.weights.attach(policy.model))
    pair = SimpleNamespace(engine=engine, learner=learner)
    yield pair
    pair.engine.close()


def step(pair, number):
    """Sample, learn, sync. Returns the completions and the learner's metrics."""
    engine, learner = pair.engine, pair.learner
    sampling = SamplingOptions(max_completion_length=16, temperature=1.0, seed=1)
    completions = engine.generate(PROMPT, 4, sampling)
    rows = [
        TrainingRow(
            prompt_ids=tuple(PROMPT),
            token_ids=completion.token_ids,
            sampling_logprobs=completion.sampling_logprobs,
            advantage=advantage,
        )
        for completion, advantage in zip(completions, (1.0, -1.0, 0.5, -0.5), strict=True)
    ]
    metrics = learner.update(rows, number)
    push(pair)
    engine.weights.verify(learner.policy.named_weights())
    return completions, metrics


def push(pair):
    pair.engine.weights.push(pair.learner.policy.named_weights(), pair.learner.optimizer.updates)


def engine_weights(engine):
    worker = engine._llm.llm_engine.model_executor.driver_worker.worker
    return dict(worker.model_runner.get_model().named_parameters())


def test_every_weight_of_the_engine_is_the_learners(pair):
    theirs = engine_weights(pair.engine)
    ours = dict(pair.learner.policy.model.named_parameters())
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        stacked = [ours[f"{attention}.{x}_proj.weight"] for x in "qkv"]
        assert torch.equal(theirs[f"{attention}.qkv_proj.weight"], torch.cat(stacked))
    before = {name: p.clone() for name, p in theirs.items()}
    with torch.no_grad():
        for parameter in ours.values():
            parameter.neg_()
    for name, parameter in theirs.items():
        assert torch.equal(parameter, -before[name])
        if "embed" in name or "head" in name:  # rows of the vocabulary are padded to 64
            assert len(parameter) == 320
            assert not parameter[SHAPE["vocab_size"] :].any()
    with torch.no_grad():
        for parameter in ours.values():
            parameter.neg_()


def test_without_a_learning_rate_nothing_drifts_over_20_steps(pair):
    learner = pair.learner
    usual = learner.config
    learner.config = replace(usual, learning_rate=0.0)
    before = learner.optimizer.live.clone()
    first, metrics = step(pair, 0)
    for number in range(1, 20):
        completions, again = step(pair, number)
        assert again["policy/ratio_mean"] == again["policy/ratio_max"] == 1
        drift = "sampling/logprob_diff_mean"
        assert again[drift] == pytest.approx(metrics[drift], rel=1e-4)
    assert torch.equal(learner.optimizer.live, before)
    assert [c.token_ids for c in completions] == [c.token_ids for c in first]
    assert [c.weight_version for c in completions] == [19] * 4
    learner.config = usual


def test_replaced_data_is_caught_before_anything_is_sampled(pair):
    weight = pair.learner.policy.model.model.norm.weight
    shared = weight.data
    weight.data = shared.clone()
    with pytest.raises(EngineError, match=r"model\.norm\.weight .* no longer lies"):
        push(pair)
    weight.data[0] += 1
    with pytest.raises(EngineError, match=r"the first is model\.norm\.weight"):
        pair.engine.weights.verify(pair.learner.policy.named_weights())
    weight.data = shared
    push(pair)
    pair.engine.weights.verify(pair.learner.policy.named_weights())


def test_one_engine_at_a_time(pair):
    with pytest.raises(UserError, match="in this process already"):
        start(pair.learner.policy.model_dir)


def test_updates_are_what_a_fresh_engine_reads_from_the_checkpoint(pair, tmp_path):
    """Greedy text and log-probs, bit by bit; and the learner outlives its engine."""
    engine, learner = pair.engine, pair.learner
    before = engine.generate(PROMPT, 1, GREEDY)[0]
    versions = [step(pair, number)[0][0].weight_version for number in range(3)]
    assert versions == list(range(versions[0], versions[0] + 3))
    after = engine.generate(PROMPT, 1, GREEDY)[0]
    assert after.token_ids != before.token_ids
    engine.close()
    learner.save(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=default_dtype("cpu"))
    ids = torch.tensor([[*PROMPT, *after.token_ids]])
    with torch.no_grad():
        logits = plain(ids).logits[0, len(PROMPT) - 1 : -1].float()
    chosen = logits.gather(-1, ids[0, len(PROMPT) :, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() <= logits.abs().max() / 64  # bfloat16 roundings
    pair.engine = start(tmp_path / "saved")
    again = pair.engine.generate(PROMPT, 1, GREEDY)[0]
    assert (again.token_ids, again.sampling_logprobs) == (after.token_ids, after.sampling_logprobs)
