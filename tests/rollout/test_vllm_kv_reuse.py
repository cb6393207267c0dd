"""The learner at work in the KV cache of a real vLLM: same bits, and nothing of it is sampled."""

from __future__ import annotations

import pytest
import torch

from polymath_fast.config import Config
from polymath_fast.errors import EngineError
from polymath_fast.kernels import scratch
from polymath_fast.kernels.cpu import workspace
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner
from polymath_fast.rollout.types import Completion, Request, SamplingOptions
from polymath_fast.rollout.vllm_kv_cache import storages

pytestmark = pytest.mark.vllm

PROMPT = [5 + 7 * i % 200 for i in range(300)]  # whole blocks of the cache, which vLLM remembers
GREEDY = SamplingOptions(max_completion_length=12, temperature=0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")


def start(model_dir, **options):
    from polymath_fast.rollout.vllm_engine import VllmEngine

    settings = {
        "stop_token_ids": [],
        "max_model_len": 384,
        "max_num_seqs": 16,
        "kv_cache_gib": 1,
        "threads": 1,
        "reuse_kv_cache": True,
    }
    return VllmEngine(model_dir, device=DEVICE, **settings | options)


def bytes_of(engine):
    """The KV cache as it lies in memory, a tensor a storage."""
    found = {each.data_ptr(): each for each in storages(engine._llm)}
    return [torch.empty(0, dtype=torch.uint8, device=DEVICE).set_(each) for each in found.values()]


def inside(tensor, engine):
    address = tensor.data_ptr()
    return any(
        whole.data_ptr() <= address and address + tensor.nbytes <= whole.data_ptr() + whole.nbytes
        for whole in bytes_of(engine)
    )


def rows_of(completions):
    advantages = (1.0, -1.0, 0.5, -0.5)
    return [
        TrainingRow(
            prompt_ids=tuple(PROMPT),
            token_ids=completion.token_ids,
            sampling_logprobs=completion.sampling_logprobs,
            advantage=advantage,
        )
        for completion, advantage in zip(completions, advantages, strict=True)
    ]


def train(model_dir, sync, reuse):
    """Four steps; the second learns and pushes nothing, its loan is overwritten with NaN.

    Returns the completions of each, the last weights, and the bytes that lay in the cache.
    """
    engine = start(model_dir, weight_sync=sync, reuse_kv_cache=reuse)
    try:
        policy = Policy(model_dir, device=DEVICE)
        config = Config(learning_rate=3e-3, max_completion_length=16)
        learner = Learner(policy, config, storage=engine.weights.attach(policy.model))
        drawn, used = [], []
        for number in range(4):
            sampling = SamplingOptions(max_completion_length=16, temperature=1.0, seed=number)
            drawn.append(engine.generate(PROMPT, 4, sampling))
            rows = rows_of(drawn[-1])
            with engine.lend() as arena:
                if number != 1:
                    learned = learner.update(rows, number)
                    assert not learned["update/skipped"]
                elif arena is not None:
                    poison(arena)
                if reuse:
                    assert any(whole[: arena.most].any() for whole in bytes_of(engine))
            used.append(0 if arena is None else arena.most)
            if number != 1:
                engine.weights.push(policy.named_weights(), learner.optimizer.updates)
        drawn.append([engine.generate(PROMPT, 1, GREEDY)[0]])
        weights = {name: tensor.clone() for name, tensor in policy.named_weights()}
        return drawn, weights, used
    finally:
        engine.close()


def poison(arena):
    """Take all that the arena has and fill it with NaN, read as any dtype."""
    for size in (1 << power for power in range(30, 8, -1)):
        while arena.capacity - arena.in_use >= size:
            part = arena.take(size, torch.uint8)
            if part is None:
                break
            part.fill_(255)
    assert arena.in_use > 0.9 * arena.capacity


@pytest.fixture(scope="module")
def plain(tiny_model):
    return train(tiny_model, "alias", reuse=False)


@pytest.mark.parametrize("sync", ["alias", "copy"])
def test_training_in_the_cache_changes_no_bit(tiny_model, plain, sync):
    workspace.clear()
    drawn, weights, used = train(tiny_model, sync, reuse=True)
    assert all(used) and plain[2] == [0] * 4
    assert drawn == plain[0]
    assert weights.keys() == plain[1].keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, plain[1][name]), name


@pytest.fixture(scope="module")
def engine(tiny_model):
    made = start(tiny_model, weight_sync="reload")
    yield made
    made.close()


def test_buffers_lie_in_the_cache_as_long_as_it_is_lent(engine):
    workspace.clear()
    names = ("logits", "slopes")
    with engine.lend() as arena:
        for name in names:
            assert inside(workspace.buffer(name, (1000, 64), torch.float32), engine)
        assert arena.capacity == sum(whole.nbytes for whole in bytes_of(engine)) >= 2**29
    for name in names:
        assert not inside(workspace.buffer(name, (1000, 64), torch.float32), engine)
    workspace.clear()


def test_nothing_that_was_written_is_sampled_though_no_weight_changed(engine):
    before = engine.generate(PROMPT, 2, GREEDY)
    with engine.lend() as arena:
        poison(arena)
    assert not any(whole.any() for whole in bytes_of(engine))
    assert engine.generate(PROMPT, 2, GREEDY) == before


def test_an_update_that_fails_gives_the_cache_back(engine):
    before = engine.generate(PROMPT, 1, GREEDY)
    with pytest.raises(MemoryError), engine.lend() as arena:
        poison(arena)
        raise MemoryError
    assert scratch.lent(torch.device(DEVICE)) is None
    assert engine.generate(PROMPT, 1, GREEDY) == before


def test_nothing_is_sampled_while_the_cache_is_lent(engine):
    with engine.lend(), pytest.raises(EngineError, match="end the loan, then sample"):
        engine.generate(PROMPT, 1, GREEDY)
    assert len(engine.generate(PROMPT, 1, GREEDY)) == 1


def test_nothing_is_lent_while_requests_are_in_flight(engine):
    truth = engine.generate(PROMPT, 1, GREEDY)[0]
    begun = Completion(
        token_ids=truth.token_ids[:8],
        sampling_logprobs=truth.sampling_logprobs[:8],
        finish_reason="aborted",
        weight_version=truth.weight_version,
    )
    stream = engine.stream([Request(prompt_ids=PROMPT, n=2, begun=[begun])], GREEDY)
    first = next(stream)
    with pytest.raises(EngineError, match="still works on requests"), engine.lend():
        pass
    (second,) = stream
    assert (first.index, second.index) == (0, 1)
    assert first.completion.token_ids == second.completion.token_ids == truth.token_ids
    with engine.lend():
        pass


def test_an_engine_that_was_not_started_to_lends_nothing_and_keeps_its_prefixes(
    engine, monkeypatch
):
    monkeypatch.setattr(engine, "_kv_cache", None)
    with engine.lend() as arena:
        assert arena is None and scratch.lent(torch.device(DEVICE)) is None
        assert len(engine.generate(PROMPT, 1, GREEDY)) == 1
