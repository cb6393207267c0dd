"""The case of flat_adamw for `registry`: everything between the gradient and the live weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import gpu_sizes
from benchmarks.case import Case, relative_error
from polymath_fast.kernels import flat_adamw, grad_norm
from polymath_fast.kernels.flat_adamw import halves

RATE, DECAY, CLIP = 1e-6, 0.01, 1.0


def flat_adamw_case(device: str) -> Case:
    """bf16 weights, fp32 state; 2^28 elements on a GPU, 2^26 on a CPU."""
    count = gpu_sizes.SIZES.weights if device == "cuda" else 2**26
    variants = {
        "ours": _ours(_state(count, device), remainder=False),
        "ours, 16-bit remainder": _ours(_state(count, device), remainder=True),
        "torch, fused AdamW": _torch(_state(count, device)),
    }
    return Case(
        shape={"n": count},
        variants=variants,
        baseline="torch, fused AdamW",
        check=lambda: check_updates(device),
        # read gradient twice, master and moments; write master, moments, live weights
        bytes=34.0 * count,
        # half of a master, read and written, and live weights that are read as well
        other_bytes={"ours, 16-bit remainder": 32.0 * count},
    )


def _state(count: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    master = torch.randn(count, device=device, generator=generator)
    return {
        "live": master.bfloat16(),
        "master": master,
        "exp_avg": torch.zeros_like(master),
        "exp_avg_sq": torch.zeros_like(master),
        "grad": torch.randn(count, device=device, generator=generator),
    }


def _ours(state: dict[str, Tensor], *, remainder: bool) -> Callable[[], None]:
    steps = torch.zeros((), dtype=torch.int64, device=state["live"].device)
    if remainder:
        state["live"], state["master"] = halves.split(state["master"])

    def run() -> None:
        norm = grad_norm(state["grad"])
        # the learner's first backward pass writes over the gradient, so nothing clears it
        options = {"weight_decay": DECAY, "max_grad_norm": CLIP, "zero_grad": False}
        flat_adamw(**state, norm=norm, step=steps, learning_rate=RATE, **options)
        steps.add_(1)

    return run


def _torch(state: dict[str, Tensor]) -> Callable[[], None]:
    """What a flat master copy costs with torch alone: clip, AdamW, round, clear."""
    master = torch.nn.Parameter(state["master"])
    optimizer = torch.optim.AdamW([master], lr=RATE, weight_decay=DECAY, fused=True)
    master.grad = state["grad"]

    def run() -> None:
        torch.nn.utils.clip_grad_norm_([master], CLIP)
        optimizer.step()
        state["live"].copy_(master.detach())
        optimizer.zero_grad(set_to_none=False)

    return run


def check_updates(device: str) -> dict[str, float]:
    """Two updates of a small state against torch's AdamW in float64, with clipping."""
    errors = {}
    for name, remainder in (("master", False), ("master, remainder", True)):
        state = _state(4096, device)
        wide = torch.nn.Parameter(state["master"].double())
        wide.grad = state["grad"].double()
        torch.nn.utils.clip_grad_norm_([wide], CLIP)
        optimizer = torch.optim.AdamW([wide], lr=RATE, weight_decay=DECAY)
        run = _ours(state, remainder=remainder)
        for _ in range(2):
            run()
            optimizer.step()
        found = state["master"]
        if remainder:
            found = halves.join(state["live"], found)
        error = relative_error(found, wide.detach())
        assert error < 1e-7, f"{name}: relative error {error:.1e}, nothing was timed"
        errors[name] = error
    return errors
