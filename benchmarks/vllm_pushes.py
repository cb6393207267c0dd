"""From the end of an optimizer's step to the first token, by our way and by vLLM's own."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_timing import Timing
from benchmarks.timing import copy_rate
from benchmarks.vllm_pair import Job, Pair
from benchmarks.weight_copies import parts_of
from polymath_fast.errors import EngineError
from polymath_fast.rollout import vllm_copy
from polymath_fast.rollout.vllm_sync import forget_prefixes

Push = Callable[[], None]
OURS = "ours"
SYNC, TOKEN = "sync", "first token"


class Way:
    """One way of bringing the learner's weights to the engine, and what was found about it."""

    def __init__(self, job: Job, pair: Pair, push: Push) -> None:
        self._job, self._pair, self._push = job, pair, push
        self._seconds: dict[str, list[float]] = {SYNC: [], TOKEN: []}
        self.bytes, self.peak_mib, self.error = 0, 0.0, ""

    def guarded(self, work: Push) -> None:
        """`work`, unless this way has failed; what vLLM refuses, or does wrong, is a result."""
        if self.error:
            return
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.error = f"{type(error).__name__}: {str(error)[:300]}"

    def prove(self) -> None:
        """Count its bytes and its memory. Raises EngineError where weights do not arrive."""
        self._pair.change()
        if self._job.strategy in ("copy", "reload"):
            _require_others(self._pair)
        self._settle()
        on_gpu = self._job.device == "cuda"
        if on_gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        with CopiedBytes() as copied:
            self._push()
        self._settle()
        if on_gpu:
            self.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        self._pair.verify()
        self.bytes = copied.bytes
        if self._job.strategy == "ipc":  # the engine's process copies
            self.bytes = 2 * sum(w.nbytes for w in self._pair.policy.model.parameters())

    def time(self) -> None:
        """Once until the device is done, once until a first token."""
        for what, end in ((SYNC, self._settle), (TOKEN, self._pair.first_token)):
            self._settle()
            began = time.perf_counter()
            self._push()
            end()
            self._seconds[what].append(time.perf_counter() - began)

    def median(self, what: str) -> float:
        """Seconds."""
        return statistics.median(self._seconds[what])

    def rows(self, name: str, rate: float) -> list[dict[str, Any]]:
        """As `gpu_report` prints them; `rate` is a plain copy's."""
        if self.error:
            return [{"what": f"{name}: {SYNC}", "error": self.error}]
        rows = []
        for what, seconds in self._seconds.items():
            timing = Timing(peak_mib=self.peak_mib)
            timing.take([1e3 * each for each in seconds])
            rows.append({"what": f"{name}: {what}"} | timing.row())
        rows[0]["bytes"] = self.bytes
        if self.bytes:
            rows[0]["share"] = self.bytes / rate / self.median(SYNC)
        return rows

    def _settle(self) -> None:
        if self._job.device == "cuda":
            torch.cuda.synchronize()


def measure(job: Job, pair: Pair) -> dict[str, Any]:
    """Rows of times (ms), bytes read and written, share of a plain copy's rate; ratios.

    A sync ends when the device is done with it. With `copy`, whose engine is in this process and
    has weights of its own, the learner's reach the same engine by vLLM's own ways, too.
    """
    pushes = {OURS: pair.push} | (vllms_own(pair) if job.strategy == "copy" else {})
    ways = {name: Way(job, pair, push) for name, push in pushes.items()}
    for way in ways.values():
        way.guarded(way.prove)
    for _ in range(job.repeats):
        for way in ways.values():
            way.guarded(way.time)
    rate = copy_rate(job.device)
    values = {"copy TB/s": rate / 1e12}
    ours, good = ways[OURS], {name: way for name, way in ways.items() if not way.error}
    for name, way in good.items():
        if way is not ours and not ours.error:
            for what in (SYNC, TOKEN):
                values[f"{name} / {OURS}, {what}"] = way.median(what) / ours.median(what)
    rows = [row for name, way in ways.items() for row in way.rows(name, rate)]
    return {"rows": rows, "values": values}


def vllms_own(pair: Pair) -> dict[str, Push]:
    """vLLM's reload; its loader called for each tensor, as TRL's trainer does; for all at once;
    and for what was packed into buffers before, as trainers of other processes do."""
    llm = pair.engine._llm
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    model = runner.get_model()
    named = [(name, weight.detach()) for name, weight in pair.policy.model.named_parameters()]

    def one_by_one() -> None:
        for each in named:
            model.load_weights([each])

    def packed() -> None:
        for part in parts_of(named, lambda each: each[1].nbytes):
            buffer = torch.cat([weight.reshape(-1) for _, weight in part])
            views = buffer.split([weight.numel() for _, weight in part])
            model.load_weights(
                [(n, view.view(w.shape)) for (n, w), view in zip(part, views, strict=True)]
            )

    loads: dict[str, Push] = {
        "load_weights one by one": one_by_one,
        "load_weights at once": lambda: model.load_weights(iter(named)),
        "load_weights in buckets": packed,
        "reload_weights": lambda: runner.reload_weights(weights_iterator=iter(named)),
    }

    def whole(load: Push) -> Push:
        def push() -> None:
            load()
            model.polymath_fast_weights.changed()
            forget_prefixes(llm)

        return push

    return {name: whole(load) for name, load in loads.items()}


def _require_others(pair: Pair) -> None:
    """Raises EngineError where a check could not tell a push from none."""
    try:
        pair.verify()
    except EngineError:
        return
    raise EngineError("the engine had the learner's new weights before they were pushed")


class CopiedBytes(TorchDispatchMode):
    """Adds up the bytes that torch's copies and our own read and write inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __enter__(self) -> CopiedBytes:
        run = vllm_copy.weight_sync

        def counted(table: Any) -> None:
            self.bytes += table.bytes
            run(table)

        self._patch = mock.patch.object(vllm_copy, "weight_sync", counted)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func is aten.copy_.default and not args[0].is_meta:
            self.bytes += args[0].nbytes + args[1].nbytes
        elif func is aten.cat.default and not found.is_meta:
            self.bytes += 2 * found.nbytes
        elif func in (aten.clone.default, aten._to_copy.default) and not found.is_meta:
            self.bytes += found.nbytes + args[0].nbytes
        return found
