"""`benchmarks.gpu_suite` from top to bottom on a CPU; `test_gpu_suite_rehearsal.py` runs this file.

Its arguments are the suite's. REHEARSAL_FAULTS names what is to go wrong, see `FAULTS`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gpu_double
import torch
from interpreter import interpret

from benchmarks import (
    attention,
    gpu_attention,
    gpu_operators,
    gpu_products,
    gpu_pytest,
    gpu_sections,
    gpu_sizes,
    gpu_suite,
    gpu_timing,
    gpu_vllm,
    layer_passes,
)
from polymath_fast.kernels.flat_adamw import _triton as adamw
from polymath_fast.kernels.token_logprobs import _triton as logprobs

TINY = gpu_sizes.Sizes(
    side=16,
    copied=2**12,
    flush=2**12,
    repeats=1,
    warmups=1,
    small_head=(32, 256),
    large_head=(64, 264),
    length=4,
    rows=8,
    many_rows=12,
    checked_rows=16,
    checked_head_rows=32,
    vocabs=(250, 256),
    attention_heads=(2, 1),
    head_size=64,
    layer_width=40,
    attention={"P=9": (9, 2, 12), "P=5": (5, 7, 3)},
    weights=2**12,
    checked_gradient=2**12 + 13,
    completions=64,
    group=8,
    checked_update=(5, 3, 6),
    learner_model="tiny-qwen2",
    update=(5, 4, 4),
    completions_at_once=2,
    unfused_completions=3,
    rival_completions=2,
    rival_completions_at_once=1,
    checked_model="tiny-qwen2",
    small_model="tiny",
    large_model="tiny-qwen3",
)
TRUNCATION = 2.0**-7
"""relative error of bf16 in the interpreter, which cuts digits off where a GPU rounds"""


def _wrong_logprobs() -> None:
    right = logprobs.token_logprobs
    logprobs.token_logprobs = lambda *given: tuple(x * 1.001 for x in right(*given))


def _wrong_norm() -> None:
    right = adamw.root
    adamw.root = lambda squares: right(squares) * 1.001


def _dies() -> None:
    gpu_suite.SECTIONS["group_advantages"] = lambda: os._exit(9)


def _hangs() -> None:
    def after_a_table() -> None:
        row = {"what": "triton"} | gpu_timing.Timing(1.0, 1.0, 1.0, 0.0).row()
        gpu_timing.keep({"rows": [row]})
        time.sleep(600)

    limit = gpu_suite._limit
    gpu_suite._limit = lambda section: 5.0 if section == "products" else limit(section)
    gpu_suite.SECTIONS["products"] = after_a_table


def _ruined() -> None:
    def illegal_access() -> None:
        def refuse(device: object = None) -> None:
            raise RuntimeError("an illegal memory access was encountered")

        torch.cuda.synchronize = refuse
        refuse()

    gpu_suite.SECTIONS["rates"] = illegal_access


FAULTS: dict[str, Callable[[], None]] = {
    "wrong logprobs": _wrong_logprobs,
    "wrong norm": _wrong_norm,
    "dies": _dies,
    "hangs": _hangs,
    "ruined": _ruined,
}


def main() -> int:
    """The suite's exit status."""
    interpret()
    gpu_sizes.SIZES = TINY
    gpu_suite.WORKER = [sys.executable, __file__]
    attention.ROUNDING = layer_passes.ERROR[torch.bfloat16] = TRUNCATION
    gpu_sections.GRADIENT_ERROR = gpu_operators.GRADIENT_ERROR = 1.5 * TRUNCATION
    gpu_attention.WAYS = {kernel: ways[-1:] for kernel, ways in gpu_attention.WAYS.items()}
    # of ten shapes of tiles the first, and the last, a persistent one
    gpu_products.TILES = gpu_products.TILES[:: len(gpu_products.TILES) - 1]
    for section in gpu_vllm.sections():  # those have a test of their own, with the real engine
        del gpu_suite.SECTIONS[section]
    folder = str(Path(os.environ["REHEARSAL_TESTS"]))
    gpu_pytest.KERNEL_TESTS = gpu_pytest.OTHER_TESTS = (folder,)
    for fault in filter(None, os.environ.get("REHEARSAL_FAULTS", "").split(",")):
        FAULTS[fault]()
    with gpu_double.installed():
        return gpu_suite.main()


if __name__ == "__main__":
    sys.exit(main())
