"""Copy and reload on the real engine: proven by checksums and by what is sampled."""

from __future__ import annotations

import pytest
import torch

from polymath_fast.errors import EngineError
from polymath_fast.learner.policy import Policy
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.types import SamplingOptions

pytestmark = pytest.mark.vllm

PROMPT = [5, 9, 17, 33, 70]
GREEDY = SamplingOptions(max_completion_length=8, temperature=0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def start(model_dir, **options):
    from polymath_fast.rollout.vllm_engine import VllmEngine

    settings = {"max_model_len": 128, "max_num_seqs": 16, "kv_cache_gib": 1, "threads": 1}
    return VllmEngine(model_dir, stop_token_ids=[], device=DEVICE, **settings | options)


@pytest.mark.skipif(DEVICE == "cuda", reason="other processes of a GPU would be hurt")
def test_too_little_memory_is_explained_and_leaves_nothing_behind(tiny_model):
    with pytest.raises(EngineError, match="a smaller --kv-cache-gib"):
        start(tiny_model, kv_cache_gib=100_000)
    made = start(tiny_model, weight_sync="alias")
    assert len(made.generate(PROMPT, 2, GREEDY)) == 2
    made.close()


@pytest.fixture(scope="module", params=["copy", "reload"])
def engine(request, tiny_model):
    made = start(tiny_model, weight_sync=request.param, readable_weights=True)
    yield made
    made.close()


@pytest.fixture
def policy(tiny_model):
    changed = Policy(tiny_model, device=DEVICE)
    with torch.no_grad():
        for parameter in changed.model.parameters():
            parameter.mul_(-0.5)
    return changed


def test_after_a_push_the_engine_has_and_samples_from_the_new_weights(engine, policy):
    assert engine.weights.attach(policy.model) is None
    with pytest.raises(EngineError, match="of 20 tensors of the engine are not the learner's"):
        engine.weights.verify(policy.named_weights())
    before = engine.generate(PROMPT, 1, GREEDY)[0]
    engine.weights.push(policy.named_weights(), 5)
    engine.weights.verify(policy.named_weights())
    after = engine.generate(PROMPT, 1, GREEDY)[0]
    truth = TransformersEngine(policy, stop_token_ids=[]).generate(PROMPT, 1, GREEDY)[0]
    assert after.token_ids == truth.token_ids != before.token_ids
    assert (before.weight_version, after.weight_version) == (0, 5)


def test_one_corrupted_byte_is_caught(engine, policy):
    engine.weights.push(policy.named_weights(), 6)
    model = engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    weight = model.model.layers[1].mlp.gate_up_proj.weight
    weight.data.view(torch.uint8)[3, 7] ^= 1
    with pytest.raises(EngineError, match=r"the first is model\.layers\.1\.mlp\.gate_proj"):
        engine.weights.verify(policy.named_weights())


def test_an_engine_that_fails_while_it_is_updated_is_an_engine_error(engine, policy, monkeypatch):
    def die():
        raise RuntimeError("worker died")

    monkeypatch.setattr(engine._llm, "reset_prefix_cache", die)
    with pytest.raises(EngineError, match="worker died"):
        engine.weights.push(policy.named_weights(), 7)
    assert engine.weights.version < 7


def test_a_sleeping_engine_gives_up_its_cache_alone_and_wakes_by_itself(engine, monkeypatch):
    """The order of vLLM's calls; their effect needs a GPU."""
    calls = []
    for name in ("sleep", "release_kv_cache_memory", "wake_up"):
        monkeypatch.setattr(
            engine._llm, name, lambda name=name, **options: calls.append((name, options))
        )
    engine.sleep()
    assert calls == []
    monkeypatch.setattr(engine, "_releases", True)
    engine.sleep()
    engine.sleep()
    assert calls == [("sleep", {"level": 0}), ("release_kv_cache_memory", {})]
    engine.generate(PROMPT, 1, GREEDY)
    engine.generate(PROMPT, 1, GREEDY)
    assert calls[2:] == [("wake_up", {"tags": ["kv_cache", "scheduling"]})]


def test_updates_are_what_a_fresh_engine_reads_from_the_checkpoint(engine, policy, tmp_path):
    """Greedy tokens and log-probs, bit by bit; comes last, for the engine is closed."""
    engine.weights.push(policy.named_weights(), 8)
    pushed, strategy = engine.generate(PROMPT, 1, GREEDY)[0], engine.weights.name
    engine.close()
    policy.save(tmp_path / "saved")
    fresh = start(tmp_path / "saved", weight_sync=strategy, readable_weights=True)
    try:
        read = fresh.generate(PROMPT, 1, GREEDY)[0]
    finally:
        fresh.close()
    assert (read.token_ids, read.sampling_logprobs) == (pushed.token_ids, pushed.sampling_logprobs)
