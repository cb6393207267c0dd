"""What the inputs of a policy loss must be, and what is said of those that are not."""

from __future__ import annotations

import torch

from polymath_fast.kernels.checks import check_tensor
from polymath_fast.kernels.faults import raise_noted
from polymath_fast.kernels.loss_choices import BY_COVARIANCE
from polymath_fast.kernels.policy_loss.spec import PolicyLossSpec


def given_spec(spec: PolicyLossSpec | None) -> PolicyLossSpec:
    """`spec`, or the default one for None. Raises ValueError for options in any other form."""
    if spec is None:
        return PolicyLossSpec()
    if not isinstance(spec, PolicyLossSpec):
        raise ValueError(f"spec is a {type(spec).__name__}: must be a PolicyLossSpec(...)")
    return spec


def check_logprobs(
    logprobs: torch.Tensor, entropy: torch.Tensor | None, spec: PolicyLossSpec
) -> None:
    """logprobs (N,) float; entropy (N,), or None where the spec has no use for it.

    Raises:
        ValueError: naming what is wrong.
    """
    check_tensor("logprobs", logprobs)
    if entropy is not None:
        check_tensor("entropy", entropy)
    if logprobs.ndim != 1 or not logprobs.is_floating_point():
        raise ValueError(f"logprobs must be float (N,), got {tuple(logprobs.shape)}")
    if entropy is not None and entropy.shape != logprobs.shape:
        raise ValueError(f"entropy is {tuple(entropy.shape)}, logprobs {tuple(logprobs.shape)}")
    if entropy is None and (spec.entropy_coef or spec.top_entropy_quantile < 1):
        raise ValueError("entropy_coef and top_entropy_quantile need entropy (N,)")


def check_terms(
    spec: PolicyLossSpec,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    sampling_logprobs: torch.Tensor | None,
    importance_weights: torch.Tensor | None,
) -> None:
    """Raises ValueError for a term of the spec whose input is missing, or that is there twice."""
    if spec.beta and ref_logprobs is None:
        raise ValueError(f"beta={spec.beta} needs ref_logprobs (N,); or set beta=0")
    if spec.importance_sampling_mode is not None:
        if sampling_logprobs is None:
            raise ValueError(
                f"importance_sampling_mode={spec.importance_sampling_mode!r} needs "
                "sampling_logprobs (N,)"
            )
        if importance_weights is not None:
            raise ValueError(
                "importance_weights and importance_sampling_mode would correct twice; give one"
            )
    if spec.off_policy_mask_threshold is not None and old_logprobs is sampling_logprobs is None:
        raise ValueError(
            f"off_policy_mask_threshold={spec.off_policy_mask_threshold} needs sampling_logprobs "
            "(N,) or old_logprobs (N,)"
        )


def checked_mask(mask: torch.Tensor | None, count: int, device: torch.device) -> torch.Tensor:
    """(N,) bool, all True where none is given. Raises ValueError."""
    if mask is None:
        return torch.ones(count, dtype=torch.bool, device=device)
    check_tensor("mask", mask)
    if mask.dtype != torch.bool or mask.shape != (count,) or mask.device != device:
        raise ValueError(
            f"mask must be bool ({count},) on {device}, got {mask.dtype} {tuple(mask.shape)} on "
            f"{mask.device}; True on trained tokens"
        )
    return mask


def check_values(
    name: str, value: torch.Tensor, sizes: tuple[int, ...], device: torch.device
) -> None:
    """One float each, of one of these sizes, on this device. Raises ValueError."""
    check_tensor(name, value)
    sized = value.ndim == 1 and len(value) in sizes
    if not sized or not value.is_floating_point() or value.device != device:
        expected = " or ".join(f"({size},)" for size in sizes)
        raise ValueError(
            f"{name} must be float {expected} on {device}, got {value.dtype} "
            f"{tuple(value.shape)} on {value.device}"
        )


def check_multiplicity(multiplicity: torch.Tensor, completions: int, spec: PolicyLossSpec) -> None:
    """(B,), whole numbers; a GPU is not waited for to look at them. Raises ValueError."""
    if spec.scope == "batch":
        ranking = f"top_entropy_quantile={spec.top_entropy_quantile}"
        if spec.formula in BY_COVARIANCE:
            ranking = f"loss_type={spec.loss_type!r}"
        raise ValueError(
            f"{ranking} ranks the tokens of the call, which multiplicity would hide; repeat the "
            "completions instead"
        )
    check_tensor("multiplicity", multiplicity)
    if multiplicity.shape != (completions,):
        raise ValueError(
            f"multiplicity must be ({completions},), got {tuple(multiplicity.shape)}; "
            "one number a completion"
        )
    on_cpu = multiplicity.device.type == "cpu"
    if on_cpu and not torch.equal(multiplicity, multiplicity.round().abs()):
        raise ValueError("multiplicity must be whole numbers from 0 on: how often each one counts")


def check_cu_seqlens(
    cu_seqlens: torch.Tensor, count: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B + 1,) int64, safe to use; on a GPU also 0-d: 1, or NaN where they did not fit."""
    check_tensor("cu_seqlens", cu_seqlens)
    if (
        cu_seqlens.ndim != 1
        or cu_seqlens.numel() < 1
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.device != device
    ):
        raise ValueError(
            f"cu_seqlens must be int32 (B + 1,) on {device}, got {cu_seqlens.dtype} "
            f"{tuple(cu_seqlens.shape)} on {cu_seqlens.device}; for example [0, 3, 7]"
        )
    if cu_seqlens.numel() == 1 and count:
        raise ValueError(f"cu_seqlens has no completion for the {count} tokens given")
    if _looked_at_later(device):
        from polymath_fast.kernels.triton.offsets import checked_offsets

        raise_noted(device)
        return checked_offsets(cu_seqlens, count)
    cu_seqlens = cu_seqlens.long()
    if device.type == "cpu":
        falls = bool((cu_seqlens.diff() < 0).any())
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != count or falls:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the {count} tokens given, got "
                f"{cu_seqlens[:8].tolist()}{' ...' if cu_seqlens.numel() > 8 else ''}"
            )
    return cu_seqlens, None


def _looked_at_later(device: torch.device) -> bool:
    """Whether looking at a tensor's numbers would make the host wait."""
    return device.type == "cuda"
