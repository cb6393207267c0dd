"""The policy loss that a run's settings describe."""

from __future__ import annotations

from dataclasses import dataclass, replace

from polymath_fast.config import Config
from polymath_fast.kernels import PolicyLossSpec
from polymath_fast.learner.mismatch import finite_or_none


@dataclass(frozen=True)
class Divisors:
    """What the loss of one update is divided by, whatever part of it enters the model."""

    tokens: int
    completions: int


def loss_spec(config: Config, divisors: Divisors | None = None) -> PolicyLossSpec:
    """The policy loss that the settings describe; with `divisors` it may be split over calls."""
    spec = PolicyLossSpec(
        loss_type=config.loss_type,
        temperature=config.temperature,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        delta=config.delta,
        beta=config.beta,
        kl_estimator=config.kl_estimator,
        entropy_coef=config.entropy_coef,
        max_completion_length=config.max_completion_length,
        importance_sampling_mode=config.importance_sampling_mode,
        importance_sampling_clip_max=finite_or_none(config.importance_sampling_clip_max),
        importance_sampling_clip_min=config.importance_sampling_clip_min,
    )
    if divisors is None:
        return spec
    by_token = spec.token_aggregation == "token-mean"
    return replace(
        spec,
        normalizer=float(divisors.tokens if by_token else divisors.completions),
        entropy_normalizer=float(divisors.tokens),
    )
