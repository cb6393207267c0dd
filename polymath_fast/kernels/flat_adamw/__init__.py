"""AdamW over flat tensors: everything that happens to a weight after its gradient, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from polymath_fast.kernels import checks, dispatch
from polymath_fast.kernels.autograd import note_written
from polymath_fast.kernels.flat_adamw.segments import Segments

__all__ = ["Segments", "flat_adamw", "grad_norm"]

_STATE = (torch.float32, torch.float64)
_LIVE = (torch.bfloat16, torch.float16, torch.float32)
_SMALLEST = 2.0**-126
PART = 1 << 16
"""a part of a gradient whose squares are added up elsewhere begins at a multiple of it"""


@dispatch.untraced
def grad_norm(
    grad: torch.Tensor,
    *,
    part: tuple[int, int] | None = None,
    add: Callable[[torch.Tensor], None] | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Euclidean norm of a gradient, read once; two runs give the same bits.

    Args:
        grad: (n,) fp32 (or fp64, reference only), contiguous.
        part: first element and the one after the last that are read here; the first is a multiple
            of `PART`, the last is, too, or n. All of them when left out.
        add: turns an fp64 tensor on the device of `grad` into the sum of everybody's, in place: of
            what each reads the norm comes out as of the whole, on "cpu" and "triton" the same bits.
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        0-d fp64 on the device of `grad`, summed up in fp64: finite exactly where every element is.
        The host does not wait for it.

    Raises:
        ValueError: wrong shape, dtype or strides, or a part that does not begin or end there.
    """
    _check_flat("grad", grad, grad, _STATE)
    first, last = part or (0, len(grad))
    if not 0 <= first <= last <= len(grad) or first % PART or (last % PART and last < len(grad)):
        raise ValueError(
            f"part is {first}:{last} of {len(grad)} elements: it must begin and end at multiples "
            f"of {PART}, or with the gradient"
        )
    implementation = dispatch.resolve("flat_adamw", grad, impl)
    squares = implementation.squares(grad.detach(), first, last)
    if add is not None:
        add(squares)
    return implementation.root(squares)


@dispatch.untraced
def flat_adamw(
    live: torch.Tensor,
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    *,
    norm: torch.Tensor,
    step: torch.Tensor,
    learning_rate: float,
    segments: Segments | None = None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = math.inf,
    grad_scale: float = 1.0,
    zero_grad: bool = True,
    impl: str = "auto",
) -> None:
    """Unscale, clip, update, decay, round into the live weights, clear the gradient: in place.

    Adam (Kingma & Ba, arXiv 1412.6980, algorithm 1) with decoupled weight decay (Loshchilov &
    Hutter, arXiv 1711.05101, algorithm 2), t = step + 1:

        g = grad / grad_scale * min(1, max_grad_norm / (norm / grad_scale))
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        p = p - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p)

    If `norm` is not finite, nothing is written but zeros to the gradient; the host learns of it
    when it reads `norm`. Elements do not depend on each other, so a part of all tensors may be
    updated by itself with the norm of the whole, and results are the same bits for any split.

    Args:
        live: (n,) bf16, fp16 or fp32 weights of the model; written: p rounded to nearest (bf16:
            ties away from zero).
        master: (n,) fp32 p, which may be an fp32 `live` itself; or int16, what p has beyond a bf16
            `live` (`halves.split`), which saves two bytes a weight and changes no bit of any
            result.
        exp_avg, exp_avg_sq: (n,) fp32 m and v.
        grad: (n,) fp32 gradient times `grad_scale`. The state may be fp64 throughout, for the
            reference.
        norm: 0-d fp64, `grad_norm` of the whole gradient as it is.
        step: 0-d int64, updates made so far; not changed here.
        learning_rate: of this update.
        segments: elements that are weights and which of them decay; left out, all are and do.
            Elements outside keep every byte. All tensors are contiguous, on one device.
        eps: at least 2^-126, the smallest normal fp32.
        max_grad_norm: inf never clips.
        zero_grad: whether the gradient becomes 0.
        impl: "auto", "reference", "cpu" or "triton".

    Raises:
        ValueError: wrong shapes, dtypes, devices, strides, or a hyperparameter out of its range.
    """
    _check_tensors(live, master, exp_avg, exp_avg_sq, grad, norm, step)
    _check_numbers(learning_rate, (beta1, beta2), eps, weight_decay, max_grad_norm, abs(grad_scale))
    written = [live, master, exp_avg, exp_avg_sq] + [grad] * zero_grad
    live, master, exp_avg, exp_avg_sq, grad = (
        tensor.detach() for tensor in (live, master, exp_avg, exp_avg_sq, grad)
    )
    if segments is not None and not isinstance(segments, Segments):
        kind = type(segments).__name__
        raise ValueError(f"segments is a {kind}: must be Segments.of([(start, stop, decays), ...])")
    if segments is None:
        segments = Segments.whole(len(live), live.device)
    if segments.end > len(live) or segments.table.device != live.device:
        raise ValueError(
            f"segments end at {segments.end} on {segments.device}, tensors at {len(live)} on "
            f"{live.device}"
        )
    found = _coefficients(
        norm, step, learning_rate, (beta1, beta2), weight_decay, max_grad_norm, grad_scale
    )
    dispatch.resolve("flat_adamw", grad, impl).flat_adamw(
        live,
        master,
        exp_avg,
        exp_avg_sq,
        grad,
        segments,
        found,
        beta1,
        beta2,
        eps,
        zero_grad,
    )
    note_written(written)


def _coefficients(
    norm: torch.Tensor,
    step: torch.Tensor,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    max_grad_norm: float,
    grad_scale: float,
) -> torch.Tensor:
    """(4,) fp64 on the device, so that the host need not wait.

    What multiplies the gradient, NaN where it must not be used; 1 / sqrt(1 - beta2^t);
    lr / (1 - beta1^t); lr weight_decay.
    """
    size = norm / abs(grad_scale)
    clip = torch.where(size > max_grad_norm, max_grad_norm / size, 1.0) / grad_scale
    factor = torch.where(norm.isfinite(), clip, math.nan)
    t = (step + 1).double()
    spread = (1 - betas[1] ** t).rsqrt()
    rate = learning_rate / (1 - betas[0] ** t)
    decay = torch.full_like(factor, learning_rate * weight_decay)
    return torch.stack([factor, spread, rate, decay])


def _check_tensors(
    live: torch.Tensor,
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    norm: torch.Tensor,
    step: torch.Tensor,
) -> None:
    _check_flat("live", live, grad, (*_LIVE, torch.float64))
    _check_flat("grad", grad, grad, _STATE)
    _check_flat("exp_avg", exp_avg, grad, (grad.dtype,))
    _check_flat("exp_avg_sq", exp_avg_sq, grad, (grad.dtype,))
    _check_flat("master", master, grad, (grad.dtype, torch.int16))
    if master.dtype == torch.int16 and (live.dtype, grad.dtype) != (torch.bfloat16, torch.float32):
        raise ValueError(
            f"master is int16, a remainder, beside live {live.dtype} and grad {grad.dtype}: only "
            "bfloat16 weights with float32 state have one; pass a float32 master"
        )
    for name, tensor, dtype in (("norm", norm, torch.float64), ("step", step, torch.int64)):
        checks.check_tensor(name, tensor)
        if tensor.shape != () or tensor.dtype != dtype or tensor.device != grad.device:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}: must be 0-d "
                f"{dtype} on {grad.device}"
            )


def _check_flat(
    name: str, tensor: torch.Tensor, like: torch.Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    checks.check_tensor(name, tensor)
    if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.dtype not in dtypes:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}: must "
            f"be contiguous (n,), {' or '.join(map(str, dtypes))}"
        )
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name} has {len(tensor)} elements on {tensor.device}, grad {len(like)} on "
            f"{like.device}: all tensors must be alike"
        )


def _check_numbers(
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    grad_scale: float,
) -> None:
    rules = [
        ("learning_rate", learning_rate, 0 <= learning_rate < math.inf, ">= 0 and finite", 1e-6),
        ("beta1", betas[0], 0 <= betas[0] < 1, "in [0, 1)", 0.9),
        ("beta2", betas[1], 0 <= betas[1] < 1, "in [0, 1)", 0.999),
        ("eps", eps, _SMALLEST <= eps < math.inf, "a normal fp32 number above 0", 1e-8),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, ">= 0 and finite", 0.0),
        ("max_grad_norm", max_grad_norm, max_grad_norm > 0, "> 0", 1.0),
        ("grad_scale", grad_scale, 0 < grad_scale < math.inf, "finite and not 0", 1.0),
    ]
    for name, value, holds, rule, works in rules:
        if not holds:
            raise ValueError(f"{name}={value}: must be {rule}, for example {works}")
