"""Checks that every operator shares, so that all implementations refuse the same inputs."""

from __future__ import annotations

import torch

from polymath_fast.kernels import faults

# What to do instead of an ignored id such as -100, which there is in no operator.
UNMASKED = "give rows that do not count any id in there, such as 0, and leave their results out"
MASKED = "give tokens that do not count any id in there, such as 0, and leave them out with mask="
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Results are fp32; fp64 inputs are worked on in fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: object) -> None:
    """Anything but a tensor is refused by its name."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{name} must be a tensor, got {type(value).__name__}; for example torch.tensor(...)"
        )


def under_autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as autocast would hand them to a matrix product, outside of it unchanged."""
    for name, value in zip(("hidden", "weight", "bias"), tensors, strict=False):
        if value is not None:
            check_tensor(name, value)
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        None if t is None else t.to(dtype) if t.dtype != torch.float64 else t for t in tensors
    )


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    without: str = UNMASKED,
) -> None:
    """hidden (N, H), weight (V, H), targets (N,), bias (V,) or None: one float dtype, one device.

    without: how the operator leaves rows out, for the message about targets.

    Raises:
        ValueError: naming what differs.
    """
    _check_matrix("hidden", "(N, H)", hidden)
    _check_matrix("weight", "(V, H)", weight)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}: "
            "both need the same hidden size H, weight is (V, H)"
        )
    _same_kind("weight", weight, "hidden", hidden)
    if bias is not None:
        if bias.shape != (weight.shape[0],):
            raise ValueError(f"bias is {tuple(bias.shape)}: must be ({weight.shape[0]},)")
        _same_kind("bias", bias, "hidden", hidden)
    check_targets(targets, hidden.shape[0], weight.shape[0], hidden.device, without)


def check_logits(logits: torch.Tensor, targets: torch.Tensor, without: str = UNMASKED) -> None:
    """logits (N, V) float, targets (N,); `without` as in `check_head`.

    Raises:
        ValueError: naming what is wrong.
    """
    _check_matrix("logits", "(N, V)", logits)
    check_targets(targets, logits.shape[0], logits.shape[1], logits.device, without)


def check_targets(
    targets: torch.Tensor, count: int, vocab: int, device: torch.device, without: str
) -> None:
    """(count,) int32 or int64 in [0, vocab).

    On a GPU the range is looked at by the kernels; what they met is raised by the next call.
    """
    check_tensor("targets", targets)
    faults.raise_noted(device)
    if targets.shape != (count,) or targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"targets must be int64 ({count},), got {targets.dtype} {tuple(targets.shape)}"
        )
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device}, the rest on {device}")
    if device.type == "cpu" and count:
        low, high = (int(value) for value in targets.aminmax())
        if low < 0 or high >= vocab:
            raise ValueError(
                f"targets lie in [{low}, {high}], outside [0, {vocab}); "
                f"there is no ignored id such as -100: {without}"
            )


def check_temperature(temperature: float) -> None:
    """A finite number above 0."""
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not (number and 0 < temperature < float("inf")):
        raise ValueError(f"temperature={temperature!r}: must be a finite number above 0")


def check_vocab_tol(vocab_tol: float | str) -> None:
    """ "auto", or a number from 0 to below 1."""
    if vocab_tol != "auto" and not (isinstance(vocab_tol, int | float) and 0 <= vocab_tol < 1):
        raise ValueError(f"vocab_tol={vocab_tol!r}: must be 'auto' or a number from 0 to below 1")


def _check_matrix(name: str, shape: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.ndim != 2 or tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be {shape} in bf16, fp16, fp32 or fp64, got {tensor.dtype} "
            f"{tuple(tensor.shape)}"
        )
    if tensor.shape[1] == 0:
        raise ValueError(f"{name} is {tuple(tensor.shape)}: its last dimension must not be empty")


def _same_kind(name: str, tensor: torch.Tensor, other: str, than: torch.Tensor) -> None:
    if tensor.dtype != than.dtype or tensor.device != than.device:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, {other} {than.dtype} on {than.device}; "
            f"cast one of them, for example {name}.to({other})"
        )
