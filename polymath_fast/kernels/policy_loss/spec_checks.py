"""Which options of a policy loss work, and which work together."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import fields
from typing import TYPE_CHECKING

from polymath_fast.kernels.loss_choices import (
    AGGREGATIONS,
    BY_COVARIANCE,
    CORRECTIONS,
    DEPENDENT,
    KL_ESTIMATORS,
    LEVELS,
    LOSS_TYPES,
    NEEDED,
    READERS,
    SEQUENCE_SUM_NORM,
    reads,
    takes,
)

if TYPE_CHECKING:
    from polymath_fast.kernels.policy_loss.spec import PolicyLossSpec

_POSITIVE = (
    "temperature",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_lambda_pos",
    "vespo_lambda_neg",
    "normalizer",
    "entropy_normalizer",
    "max_completion_length",
    "log_ratio_clamp",
    "dro_beta",
    "kl_max",
    "importance_sampling_clip_max",
    "off_policy_mask_threshold",
)

_SHARES = {"top_entropy_quantile": 0.2, "clip_cov_ratio": 0.0002, "kl_cov_ratio": 0.0002}
"""option -> a share of the tokens that works"""

_EXAMPLES = {
    "epsilon_high": ": the largest ratio itself, for example 5.0",
    "dro_beta": ", for example 0.1",
}


def check(spec: PolicyLossSpec) -> None:
    """Raise ValueError for the first option that cannot work."""
    _check_choices(spec)
    _check_numbers(spec)
    _check_combinations(spec)
    _check_unused(spec)


def _check_choices(spec: PolicyLossSpec) -> None:
    _one_of("loss_type", spec.loss_type, LOSS_TYPES)
    _one_of("importance_sampling_level", spec.importance_sampling_level, LEVELS)
    _one_of("kl_estimator", spec.kl_estimator, KL_ESTIMATORS)
    _one_of("entropy_aggregation", spec.entropy_aggregation, AGGREGATIONS)
    if spec.aggregation is not None:
        _one_of("aggregation", spec.aggregation, AGGREGATIONS)
    if spec.importance_sampling_mode is not None:
        _one_of("importance_sampling_mode", spec.importance_sampling_mode, CORRECTIONS)


def _check_numbers(spec: PolicyLossSpec) -> None:
    for name in _POSITIVE:
        value = getattr(spec, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value}: must be a finite number above 0")
    for name in ("beta", "entropy_coef", "vespo_k_pos", "vespo_k_neg"):
        if not math.isfinite(getattr(spec, name)):
            raise ValueError(f"{name}={getattr(spec, name)}: must be finite, for example 0.001")
    if not 0 <= spec.epsilon <= 1:
        raise ValueError(f"epsilon={spec.epsilon}: must be between 0 and 1, for example 0.2")
    if spec.epsilon_high is not None and not spec.epsilon_high >= 0:
        raise ValueError(f"epsilon_high={spec.epsilon_high}: must be >= 0, for example 0.28")
    for name, works in _SHARES.items():
        if not 0 < getattr(spec, name) <= 1:
            raise ValueError(
                f"{name}={getattr(spec, name)}: must be above 0 and at most 1, for example {works}"
            )
    if not 0 <= spec.ppo_kl_coef < math.inf:
        raise ValueError(f"ppo_kl_coef={spec.ppo_kl_coef}: must be finite and >= 0, such as 0.1")
    if not -math.inf < spec.clip_cov_lb < spec.clip_cov_ub:
        raise ValueError(
            f"clip_cov_lb={spec.clip_cov_lb} must be finite and below "
            f"clip_cov_ub={spec.clip_cov_ub}, for example 1.0 and 5.0"
        )
    low, high = "importance_sampling_clip_min", "importance_sampling_clip_max"
    check_bounds(low, getattr(spec, low), high, getattr(spec, high))
    for name in ("delta", "clip_ratio_c"):
        bound = getattr(spec, name)
        if bound is not None and not bound > spec.clip_low:
            raise ValueError(
                f"{name}={bound}: must be above the lower clip {spec.clip_low}, for example 3.0"
            )


def check_bounds(low: str, least: float | None, high: str, most: float | None) -> None:
    """Raise ValueError unless both, where given, are above 0, and in their order."""
    for name, value in ((low, least), (high, most)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}: must be above 0, or None, for example 0.5 or 3.0")
    if least is not None and most is not None and least > most:
        raise ValueError(f"{low}={least} is above {high}={most}; for example 0.5 and 3.0")


def _check_combinations(spec: PolicyLossSpec) -> None:
    needed = NEEDED.get(spec.formula)
    if needed is not None and getattr(spec, needed) is None:
        raise ValueError(f"loss_type={spec.loss_type!r} needs {needed}{_EXAMPLES[needed]}")
    if spec.formula in ("vespo", "reinforce", "dro") and spec.importance_sampling_level != "token":
        raise ValueError(
            f"importance_sampling_level={spec.importance_sampling_level!r} has no effect on "
            f"loss_type={spec.loss_type!r}; leave it at 'token'"
        )
    if spec.formula == "geo_mean" and spec.importance_sampling_level == "sequence_token":
        raise ValueError("loss_type='geo_mean' has one ratio a completion; leave the level out")
    if spec.formula in BY_COVARIANCE and spec.importance_sampling_level != "token":
        raise ValueError(
            f"importance_sampling_level={spec.importance_sampling_level!r}: loss_type="
            f"{spec.loss_type!r} chooses tokens by their own ratios; leave it at 'token'"
        )
    correction = spec.importance_sampling_mode
    if correction is not None and not takes(spec.loss_type, correction):
        raise ValueError(
            f"importance_sampling_mode={correction!r}: loss_type={spec.loss_type!r} takes weights "
            "of tokens; use 'token_truncate' or 'token_mask'"
        )
    uses = [spec.token_aggregation] + [spec.entropy_aggregation] * bool(spec.entropy_coef)
    if SEQUENCE_SUM_NORM in uses and spec.max_completion_length is None:
        raise ValueError(
            f"{SEQUENCE_SUM_NORM} (loss_type={spec.loss_type!r}) needs max_completion_length, "
            "the sampler's limit, for example 1024"
        )
    alike = spec.entropy_aggregation == spec.token_aggregation
    if spec.entropy_coef and spec.normalizer and not (spec.entropy_normalizer or alike):
        raise ValueError(
            f"entropy_coef with normalizer={spec.normalizer} ({spec.token_aggregation}) needs "
            f"entropy_normalizer too, because entropies are summed up by {spec.entropy_aggregation}"
        )


def _check_unused(spec: PolicyLossSpec) -> None:
    """An option that nothing reads is refused, never ignored."""
    defaults = {field.name: field.default for field in fields(spec)}
    for name in READERS:
        if getattr(spec, name) != defaults[name] and not reads(spec.loss_type, name):
            raise ValueError(
                f"{name}={getattr(spec, name)!r} has no effect on loss_type={spec.loss_type!r}; "
                f"leave it at {defaults[name]!r}"
            )
    for name, other in DEPENDENT.items():
        if getattr(spec, name) != defaults[name] and not getattr(spec, other):
            raise ValueError(
                f"{name}={getattr(spec, name)!r} has no effect without {other}; "
                f"leave it at {defaults[name]!r}"
            )


def _one_of(name: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
