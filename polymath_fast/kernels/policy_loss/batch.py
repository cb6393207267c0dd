"""What a policy loss knows about its tokens before it sees a single log-prob."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from polymath_fast.kernels.checks import check_tensor
from polymath_fast.kernels.faults import raise_noted
from polymath_fast.kernels.policy_loss.packed import sequence_ids, sequence_sum
from polymath_fast.kernels.policy_loss.spec import (
    SEQUENCE_MEAN,
    SEQUENCE_SUM,
    SEQUENCE_SUM_NORM,
    TOKEN_MEAN,
    TOKEN_SUM,
    PolicyLossSpec,
)


@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """One value a token, all on one device, floats in one dtype (fp32, or fp64 in tests)."""

    cu_seqlens: torch.Tensor  # (B + 1,) int64
    advantages: torch.Tensor  # (N,)
    mask: torch.Tensor  # (N,) bool, True on trained tokens
    weights: torch.Tensor  # (N,) share of a token's loss in the total
    entropy_weights: torch.Tensor | None  # (N,) share of a token's entropy in the bonus
    old_logprobs: torch.Tensor | None  # (N,); None: on-policy, the ratio is 1
    ref_logprobs: torch.Tensor | None  # (N,)
    sampling_logprobs: torch.Tensor | None  # (N,) as the rollout engine reported them
    importance_weights: torch.Tensor | None  # (N,) multiply the policy term
    multiplicity: torch.Tensor | None  # (N,) how often a token counts; None: once

    def rows(self, start: int, stop: int) -> PolicyBatch:
        """The same for tokens [start, stop); completions that reach over an end are cut there."""
        inside = (self.cu_seqlens[1:] > start) & (self.cu_seqlens[:-1] < stop)
        ends = (self.cu_seqlens[1:][inside] - start).clamp(max=stop - start)
        return self.take(slice(start, stop), torch.nn.functional.pad(ends, (1, 0)))

    def take(self, index: slice | torch.Tensor, cu_seqlens: torch.Tensor) -> PolicyBatch:
        """The tokens of `index`, which `cu_seqlens` divides into completions."""
        taken = {
            field.name: value[index]
            for field in fields(self)
            if field.name != "cu_seqlens" and (value := getattr(self, field.name)) is not None
        }
        return replace(self, cu_seqlens=cu_seqlens, **taken)


def prepare(
    spec: PolicyLossSpec,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    sampling_logprobs: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    multiplicity: torch.Tensor | None = None,
) -> PolicyBatch:
    """Check shapes and devices, spread per-completion values over tokens, weigh the tokens.

    Raises:
        ValueError: a tensor of another shape, dtype or device than the contract says; a term of
            the spec whose input is missing. Offsets that do not fit are raised by a later call
            where the tensors are on a GPU (see `faults`): this one's loss is NaN and has no
            gradient.
    """
    cu_seqlens, sound = check_cu_seqlens(cu_seqlens, count, device)
    completions = cu_seqlens.numel() - 1
    _check_inputs(spec, old_logprobs, ref_logprobs, sampling_logprobs, importance_weights)
    if multiplicity is not None and spec.top_entropy_quantile < 1:
        raise ValueError(
            f"top_entropy_quantile={spec.top_entropy_quantile} ranks the tokens of the call, which "
            "multiplicity would hide; repeat the completions instead"
        )
    if mask is None:
        mask = torch.ones(count, dtype=torch.bool, device=device)
    check_tensor("mask", mask)
    if mask.dtype != torch.bool or mask.shape != (count,) or mask.device != device:
        raise ValueError(
            f"mask must be bool ({count},) on {device}, got {mask.dtype} {tuple(mask.shape)} on "
            f"{mask.device}; True on trained tokens"
        )
    ids = sequence_ids(cu_seqlens, count)

    def per_token(name: str, value: torch.Tensor | None, spread: bool) -> torch.Tensor | None:
        if value is None:
            return None
        check_tensor(name, value)
        shapes = ((completions,), (count,)) if spread else ((count,),)
        if value.shape not in shapes or not value.is_floating_point() or value.device != device:
            expected = " or ".join(str(shape) for shape in shapes)
            raise ValueError(
                f"{name} must be float {expected} on {device}, got {value.dtype} "
                f"{tuple(value.shape)} on {value.device}"
            )
        value = value.detach().to(dtype)
        return value[ids] if spread and value.shape == (completions,) else value

    if multiplicity is not None:
        _check_multiplicity(multiplicity, completions)
    by_token = spec.formula != "vespo"
    multiplicity = per_token("multiplicity", multiplicity, True)
    if multiplicity is not None:
        mask = mask & (multiplicity > 0)
    weights, entropy_weights = _all_weights(spec, mask, cu_seqlens, ids, dtype, multiplicity)
    if sound is not None:
        weights = weights * sound
    return PolicyBatch(
        cu_seqlens=cu_seqlens,
        advantages=per_token("advantages", advantages, True),
        mask=mask,
        weights=weights,
        entropy_weights=entropy_weights,
        old_logprobs=per_token("old_logprobs", old_logprobs, False),
        ref_logprobs=per_token("ref_logprobs", ref_logprobs, False),
        sampling_logprobs=per_token("sampling_logprobs", sampling_logprobs, False),
        importance_weights=per_token("importance_weights", importance_weights, by_token),
        multiplicity=multiplicity,
    )


def _check_multiplicity(multiplicity: torch.Tensor, completions: int) -> None:
    check_tensor("multiplicity", multiplicity)
    if multiplicity.shape != (completions,):
        raise ValueError(
            f"multiplicity must be ({completions},), got {tuple(multiplicity.shape)}; "
            "one number a completion"
        )
    on_cpu = multiplicity.device.type == "cpu"
    if on_cpu and not torch.equal(multiplicity, multiplicity.round().abs()):
        raise ValueError("multiplicity must be whole numbers from 0 on: how often each one counts")


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


def _check_inputs(
    spec: PolicyLossSpec,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    sampling_logprobs: torch.Tensor | None,
    importance_weights: torch.Tensor | None,
) -> None:
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


def _all_weights(
    spec: PolicyLossSpec,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    ids: torch.Tensor,
    dtype: torch.dtype,
    multiplicity: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(N,) weight of each token's loss and, with an entropy bonus, of its entropy."""
    trained = mask.to(dtype)
    counted = trained if multiplicity is None else trained * multiplicity

    def weights(how: str, divisor: float | None) -> torch.Tensor:
        completions = max(cu_seqlens.numel() - 1, 1)
        if divisor is None and multiplicity is not None and how not in (TOKEN_MEAN, TOKEN_SUM):
            # empty completions have no token that says how often they count
            raise ValueError(f"multiplicity with {how} needs the spec's normalizer")
        if how == TOKEN_MEAN:
            return counted / (divisor or counted.sum().clamp(min=1))
        if how == SEQUENCE_MEAN:
            lengths = sequence_sum(trained, cu_seqlens).clamp(min=1)
            return counted / (lengths[ids] * (divisor or completions))
        if how == SEQUENCE_SUM_NORM:
            return counted / ((divisor or completions) * spec.max_completion_length)
        if how == SEQUENCE_SUM:
            return counted / (divisor or completions)
        return counted / (divisor or 1)

    by_loss = weights(spec.token_aggregation, spec.normalizer)
    if not spec.entropy_coef:
        return by_loss, None
    divisor = spec.entropy_normalizer
    if divisor is None and spec.entropy_aggregation == spec.token_aggregation:
        divisor = spec.normalizer
    return by_loss, weights(spec.entropy_aggregation, divisor)


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
