"""What a policy loss tells about its tokens, beside the loss."""

from __future__ import annotations

import torch

from polymath_fast.kernels.loss_choices import BY_COVARIANCE
from polymath_fast.kernels.policy_loss.batch import PolicyBatch
from polymath_fast.kernels.policy_loss.packed import steady_sum
from polymath_fast.kernels.policy_loss.spec import PolicyLossSpec
from polymath_fast.kernels.policy_loss.table import CLIPPING
from polymath_fast.kernels.policy_loss.terms import PolicyTerms


def summarize(
    batch: PolicyBatch,
    terms: PolicyTerms,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Metrics as 0-d tensors on the device, over the trained tokens of the call.

    Means weigh every trained token alike, so calls combine exactly: weigh each by its "tokens".
    """
    mask = batch.mask
    counted = mask if batch.multiplicity is None else mask * batch.multiplicity
    tokens = counted.sum()

    def mean(values: torch.Tensor) -> torch.Tensor:
        values = torch.where(mask, values.to(logprobs.dtype), 0)
        return steady_sum(values * counted) / tokens.clamp(min=1)

    def largest(values: torch.Tensor) -> torch.Tensor:
        return values.max() if values.numel() else values.new_zeros(())

    metrics = {
        "tokens": tokens,
        "nonfinite_rows": terms.unsound.sum(),
        "ratio/mean": mean(terms.ratio),
        "ratio/max": largest(torch.where(mask, terms.ratio, 0)),
    }
    if entropy is not None:
        metrics["entropy"] = mean(entropy)
    if terms.kl is not None:
        metrics["kl"] = mean(terms.kl)
    if terms.importance is not None:
        metrics["importance_weight/mean"] = mean(terms.importance)
    if batch.sampling_logprobs is not None:
        gap = (logprobs - batch.sampling_logprobs).abs().nan_to_num(nan=0.0)
        metrics["sampling/logprob_diff_mean"] = mean(gap)
        metrics["sampling/logprob_diff_max"] = largest(torch.where(mask, gap, 0))
    low, high = terms.token_loss.clipped_low, terms.token_loss.clipped_high
    if low is not None:
        metrics["clip_ratio/low"] = mean(low)
        metrics["clip_ratio/high"] = mean(high)
        metrics["clip_ratio/region"] = mean(low | high)
    if terms.token_loss.chosen is not None:
        metrics["covariance/chosen_share"] = mean(terms.token_loss.chosen)
    return metrics


def metric_names(
    spec: PolicyLossSpec, *, entropy: bool, sampling: bool, weights: bool
) -> tuple[str, ...]:
    """Keys of `summarize` in order, known before there are tensors.

    Args:
        entropy, sampling, weights: whether the call has entropies, `sampling_logprobs` and
            `importance_weights`.
    """
    names = ["tokens", "nonfinite_rows", "ratio/mean", "ratio/max"]
    if entropy:
        names.append("entropy")
    if spec.beta:
        names.append("kl")
    if weights or spec.importance_sampling_mode is not None:
        names.append("importance_weight/mean")
    if sampling:
        names += ["sampling/logprob_diff_mean", "sampling/logprob_diff_max"]
    if spec.formula in CLIPPING:
        names += ["clip_ratio/low", "clip_ratio/high", "clip_ratio/region"]
    if spec.formula in BY_COVARIANCE:
        names.append("covariance/chosen_share")
    return tuple(names)
