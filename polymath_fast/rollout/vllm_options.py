"""What vLLM is told at its start, and what is said when that fails."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

START_FAILURES = (
    RuntimeError,
    ValueError,
    AssertionError,
    ImportError,
    OSError,
    subprocess.SubprocessError,
)
"""what vLLM and the compilers that it calls raise"""
_DEFAULT_GRAPH_SIZE = 512  # sequences up to which vLLM captures CUDA graphs by itself
_GRAPH_STEP = 16


def engine_options(
    model_dir: Path, *, dtype: str, max_model_len: int, max_num_seqs: int, device: str, seed: int
) -> dict[str, Any]:
    """What vLLM is told whatever the strategy of the weights."""
    options = {
        "model": str(model_dir),
        "dtype": dtype,
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
    if device != "cpu":
        options["enable_flashinfer_autotune"] = False  # takes long, for kernels of quantised models
    if device != "cpu" and max_num_seqs > _DEFAULT_GRAPH_SIZE:
        # Sizes are captured in steps of 16: the largest batch must not fall between two of them.
        options["max_cudagraph_capture_size"] = -(-max_num_seqs // _GRAPH_STEP) * _GRAPH_STEP
    return options


def kv_cache_options(gib: float) -> dict[str, Any]:
    """For a KV cache of that size on a GPU."""
    import torch

    free, total = torch.cuda.mem_get_info(0)
    # The share bounds nothing then, but vLLM wants as much of the device to be free at the start.
    return {
        "kv_cache_memory_bytes": int(gib * 2**30),
        "gpu_memory_utilization": 0.9 * free / total,
    }


def start_failure(error: Exception) -> str:
    """What an engine that did not start says, with advice where there is some."""
    advice, text = "", str(error).lower()
    if "kv cache" in text and "needed" in text:
        advice = (
            "; a larger --kv-cache-gib holds it, and a smaller --max-completion-length needs less"
        )
    elif "memory" in text:
        advice = (
            "; a smaller --kv-cache-gib, or an end to other processes on this device, leaves more "
            "memory; --engine transformers needs no second copy of anything"
        )
    return f"vLLM did not start: {error}{advice}"
