"""What a run says of scratch memory in vLLM's KV cache. Needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from polymath_fast.errors import EngineError, UserError
from polymath_fast.kernels.scratch import Arena, lend, lent
from polymath_fast.rollout import build_engine, loan, require_kv_reuse
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.vllm_kv_cache import LentCache

LEARNED, SKIPPED = {"update/skipped": 0.0}, {"update/skipped": 1.0}


def used(*sizes):
    owner = torch.zeros(2**20, dtype=torch.uint8)
    with lend(Arena([owner.untyped_storage()])) as arena:
        for size in sizes:
            arena.take(size, torch.uint8)
    return arena


def test_without_a_loan_there_is_nothing_to_tell():
    assert loan.metrics(None) == {} and loan.note(None, LEARNED) is None
    assert loan.note(used(), SKIPPED) is None


def test_what_fits_is_a_metric():
    arena = used(2**18, 2**19)
    assert loan.metrics(arena) == {
        "memory/kv_reused_gib": 0.75 / 2**10,
        "memory/kv_refused_gib": 0.0,
    }
    assert loan.note(arena, LEARNED) is None


def test_what_does_not_fit_is_said_in_the_same_words_whatever_its_size():
    """The monitor says a text once."""
    notes = {loan.note(used(2**10, size), LEARNED) for size in (2**21, 2**22)}
    assert len(notes) == 1 and "a larger --kv-cache-gib holds more" in notes.pop()
    assert loan.metrics(used(2**21))["memory/kv_refused_gib"] == 2 / 2**10


def test_an_option_without_effect_is_said():
    assert "had no effect" in loan.note(used(), LEARNED)


def test_only_a_vllm_in_this_process_has_a_cache_to_reuse():
    for sync in ("alias", "copy", "reload"):
        require_kv_reuse("vllm", sync)
    with pytest.raises(UserError, match="embedded sampler .* take --engine vllm"):
        require_kv_reuse("transformers", "identity")
    with pytest.raises(UserError, match="in another process.* --weight-sync alias works"):
        require_kv_reuse("vllm", "ipc")
    with pytest.raises(ValueError, match="within a process"):
        build_engine(
            "vllm",
            model_dir=None,
            policy=None,
            stop_token_ids=[],
            max_model_len=8,
            max_num_seqs=1,
            device="cpu",
            dtype="float32",
            weight_sync="ipc",
            reuse_kv_cache=True,
        )


def test_the_embedded_sampler_lends_nothing():
    with TransformersEngine.lend(TransformersEngine.__new__(TransformersEngine)) as arena:
        assert arena is None


class Llm:
    """As much of vLLM as a loan touches, with `kv_caches` as its runner holds them."""

    def __init__(self, kv_caches, said):
        self.said, self.busy, self.forgets = said, False, True
        runner = SimpleNamespace(kv_caches=kv_caches)
        worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
        scheduler = SimpleNamespace(has_requests=lambda: self.busy)
        core = SimpleNamespace(scheduler=scheduler, batch_queue=None)
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=worker),
            engine_core=SimpleNamespace(engine_core=core),
        )

    def reset_prefix_cache(self):
        self.said.append("forget")
        return self.forgets


def layers_of_26():
    """A storage a layer, seen as (keys and values, blocks, tokens, heads, entries)."""
    raw = [torch.zeros(2**16, dtype=torch.int8) for _ in range(3)]
    views = [each.view(torch.bfloat16).view(2, 16, 8, 2, 64).transpose(2, 3) for each in raw]
    return raw, [*views, views[0]]  # the last layer reads the first one's


def layers_of_32():
    """One storage for all layers, of which each sees strided blocks; one layer keeps a list."""
    raw = torch.zeros(3 * 2**16, dtype=torch.int8)
    blocks = raw.view(torch.bfloat16).view(16, 3, 2, 8, 128)
    return [raw], [blocks[:, 0], blocks[:, 1], [blocks[:, 2, 0], blocks[:, 2, 1]]]


@pytest.mark.parametrize("layout", [layers_of_26, layers_of_32])
def test_every_storage_of_the_cache_is_lent_once_between_two_waits(layout, monkeypatch):
    said = []
    raw, views = layout()

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            dirty = any(each.any() for each in raw)
            said.append((f"{self.name} waits for {other.name}", dirty))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream("learner"))
    cache = LentCache(Llm(views, said))
    assert cache._stream is None  # on a CPU
    cache._stream = Stream("engine")
    with cache.lend() as arena:
        assert arena.capacity == 3 * 2**16
        while (part := arena.take(2**12, torch.uint8)) is not None:
            part.fill_(255)
        assert all((each.view(torch.uint8) == 255).float().mean() > 0.9 for each in raw)
        with pytest.raises(EngineError, match="end the loan"):
            cache.require_back()
    cache.require_back()
    assert said == [
        "forget",
        ("learner waits for engine", False),
        ("engine waits for learner", False),  # by then all is zero
    ]


@pytest.mark.parametrize("trouble", [{"busy": True}, {"forgets": False}])
def test_a_cache_in_use_is_not_touched(trouble):
    llm = Llm([torch.ones(2**12)], [])
    vars(llm).update(trouble)
    cache = LentCache(llm)
    with pytest.raises(EngineError, match="still works|before its KV cache was lent"):
        cache.lend().__enter__()
    cache.require_back()
    assert lent(torch.device("cpu")) is None
