"""How far the learner's log-probs are from the sampler's, and what that does to the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polymath_fast.config import Config
from polymath_fast.kernels.policy_loss import importance_weights
from polymath_fast.learner.packing import token_counts

_LARGEST = 1e8  # of an importance weight, so that its square stays finite in float32


class Mismatch:
    """Sums over the tokens of one batch, on the device until `sums`.

    Sampler and learner hold the same weights, so the differences are rounding; more of it means
    stale weights, another temperature or another tokenisation.
    """

    def __init__(self, config: Config) -> None:
        self._mode = config.importance_sampling_mode
        self._bounds = {
            "clip_max": finite_or_none(config.importance_sampling_clip_max),
            "clip_min": config.importance_sampling_clip_min,
        }
        self._sums: dict[str, Tensor] = {}
        self._largest: Tensor | None = None

    def add(
        self,
        logprobs: Tensor,
        sampling_logprobs: Tensor,
        cu_seqlens: Tensor,
        multiplicity: Tensor | None = None,
    ) -> None:
        """Take in (N,) log-probs of the learner before its update, and of the sampler; NaN, where
        the sampler could not say, counts as equal. `multiplicity` (B,): None = all once."""
        log_ratio = (logprobs - sampling_logprobs).nan_to_num(nan=0.0)
        ratio, distance = log_ratio.exp(), log_ratio.abs()
        counts = token_counts(cu_seqlens, multiplicity, len(ratio))
        of_tokens = {
            "logprob_diff_mean": distance,
            "kl_k1": -log_ratio,
            "kl_k3": ratio - 1 - log_ratio,
            "ratio_outside": (ratio < 0.5) | (ratio > 2),
        }
        weights, weight_counts = ratio, counts
        if self._mode is not None:
            level, how = self._mode.split("_")
            known = (logprobs, sampling_logprobs, cu_seqlens)
            weights = importance_weights(*known, mode=f"{level}_truncate", clip_max=None)
            changed = importance_weights(*known, mode=self._mode, **self._bounds) != weights
            if level == "sequence":
                changed = token_counts(cu_seqlens, changed.float(), len(ratio))
                weight_counts = torch.ones_like(weights) if multiplicity is None else multiplicity
            of_tokens["masked_ratio" if how == "mask" else "truncated_ratio"] = changed
        weights = weights.clamp(max=_LARGEST)
        sums = {name: (values * counts).sum() for name, values in of_tokens.items()} | {
            "tokens": counts.sum(),
            "weights": (weights * weight_counts).sum(),
            "squares": (weights.square() * weight_counts).sum(),
            "count": weight_counts.sum(),
        }
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value
        largest = torch.cat([distance, distance.new_zeros(1)]).max()
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def sums(self) -> dict[str, float]:
        """What `means` makes figures of; those of several processes add up."""
        return {name: float(value) for name, value in self._sums.items()}

    def largest(self) -> float:
        """Difference of two log-probs."""
        return 0.0 if self._largest is None else float(self._largest)


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over tokens, and the effective sample size as a share (Kish 1965)."""
    shares = dict(sums)
    tokens, count = shares.pop("tokens"), shares.pop("count")
    total, squares = shares.pop("weights"), shares.pop("squares")
    return {
        **{f"sampling/{name}": value / max(1.0, tokens) for name, value in shares.items()},
        "sampling/effective_sample_size": total**2 / max(count * squares, 1e-30),
    }


def finite_or_none(bound: float) -> float | None:
    """A bound as the operators take it: None is none."""
    return bound if math.isfinite(bound) else None
