"""What a policy loss knows about its tokens before it sees a single log-prob."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from polymath_fast.kernels.policy_loss.input_checks import (
    check_cu_seqlens,
    check_multiplicity,
    check_terms,
    check_values,
    checked_mask,
)
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
    check_terms(spec, old_logprobs, ref_logprobs, sampling_logprobs, importance_weights)
    mask = checked_mask(mask, count, device)
    ids = sequence_ids(cu_seqlens, count)

    def per_token(name: str, value: torch.Tensor | None, spread: bool) -> torch.Tensor | None:
        if value is None:
            return None
        check_values(name, value, (completions, count) if spread else (count,), device)
        value = value.detach().to(dtype)
        return value[ids] if spread and len(value) == completions else value

    if multiplicity is not None:
        check_multiplicity(multiplicity, completions, spec)
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
