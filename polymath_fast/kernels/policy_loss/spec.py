"""The options of a policy loss, by the names TRL gives them, checked when the spec is built."""

from __future__ import annotations

import ast
import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

TOKEN_MEAN = "token-mean"
SEQUENCE_MEAN = "seq-mean-token-mean"
SEQUENCE_SUM = "seq-mean-token-sum"
SEQUENCE_SUM_NORM = "seq-mean-token-sum-norm"
TOKEN_SUM = "token-sum"
AGGREGATIONS = (TOKEN_MEAN, SEQUENCE_MEAN, SEQUENCE_SUM, SEQUENCE_SUM_NORM, TOKEN_SUM)

LOSS_TYPES: dict[str, tuple[str, str]] = {
    "grpo": ("clip", SEQUENCE_MEAN),
    "gspo": ("clip", SEQUENCE_MEAN),
    "bnpo": ("clip", TOKEN_MEAN),
    "dapo": ("clip", TOKEN_MEAN),
    "dr_grpo": ("clip", SEQUENCE_SUM_NORM),
    "luspo": ("clip", SEQUENCE_SUM),
    "cispo": ("cispo", TOKEN_MEAN),
    "cispo_two_sided": ("cispo_two_sided", TOKEN_MEAN),
    "sapo": ("sapo", SEQUENCE_MEAN),
    "vespo": ("vespo", TOKEN_MEAN),
    "geo_mean": ("geo_mean", SEQUENCE_MEAN),
    "reinforce": ("reinforce", TOKEN_MEAN),
    "gpg": ("reinforce", TOKEN_MEAN),
    "dro": ("dro", TOKEN_MEAN),
    "dppo_tv": ("dppo_tv", TOKEN_MEAN),
    "dppo_kl": ("dppo_kl", TOKEN_MEAN),
}
"""loss_type -> (formula, how tokens are summed up)"""

LEVELS = ("token", "sequence", "sequence_token")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True, kw_only=True)
class PolicyLossSpec:
    """One policy loss: formula, clipping, KL penalty, entropy bonus, normalisation.

    Micro-batches: an operator returns the sum over its tokens of weight * token loss. With
    `normalizer=None` the weights are those of the tokens it was given. To split one step over
    several calls, give each call the same spec with the divisor D of the whole step; the losses
    and the gradients of the calls then add up to those of one call, however the step was split.

    | aggregation             | loss_type                  | weight of a token    | D counts       |
    |-------------------------|----------------------------|----------------------|----------------|
    | token-mean              | dapo bnpo cispo vespo gpg  | 1 / D                | trained tokens |
    |                         | reinforce dro dppo_*       |                      |                |
    | seq-mean-token-mean     | grpo gspo sapo geo_mean    | 1 / (D own length)   | completions    |
    | seq-mean-token-sum      | luspo                      | 1 / D                | completions    |
    | seq-mean-token-sum-norm | dr_grpo                    | 1 / (D max_c._length)| completions    |
    | token-sum               |                            | 1 / D                | nothing: 1     |

    A completion must stay in one call unless the aggregation is token-mean or token-sum and the
    `scope` is "token". `top_entropy_quantile` is always taken over the tokens of the call.
    """

    loss_type: str = "dapo"
    """which formula and aggregation, see `LOSS_TYPES`"""
    temperature: float = 1.0
    """divides the logits; log-probs and entropy are those of the scaled distribution"""

    epsilon: float = 0.2
    """the ratio may fall to 1 - epsilon; dppo: allowed divergence where the advantage is < 0"""
    epsilon_high: float | None = None
    """the ratio may rise to 1 + epsilon_high (None: epsilon); cispo: the largest ratio itself"""
    delta: float | None = None
    """the ratio counts as at most delta, also where the advantage is negative (INTELLECT-2)"""
    clip_ratio_c: float | None = None
    """dual clip: the loss of a negative advantage is at most clip_ratio_c times it; dppo: largest
    ratio, 20 where left out"""
    importance_sampling_level: str = "token"
    """token; sequence (GSPO: one ratio a completion); sequence_token (that value, token slopes)"""
    log_ratio_clamp: float | None = 20.0
    """log-ratios beyond it count as it and carry no gradient, so that exp never overflows"""
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    """sharpness of the soft gate where the advantage is positive / is not"""
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    """shape and rate of the gamma weight where the advantage is >= 0 / is negative"""
    dro_beta: float | None = None
    """weight of the squared log-ratio, needed for dro"""

    importance_sampling_mode: str | None = None
    """weigh by the ratio of `old_logprobs` to `sampling_logprobs`, cut as `CORRECTIONS` say"""
    importance_sampling_clip_max: float | None = 3.0
    importance_sampling_clip_min: float | None = None
    """bounds of that weight"""
    off_policy_mask_threshold: float | None = None
    """drop completions with a negative advantage that the sampler found likelier than the policy
    by more than this many nats a token (DeepSeek-V3.2)"""
    top_entropy_quantile: float = 1.0
    """train on this share of tokens only, those of highest entropy (arXiv 2506.01939)"""

    beta: float = 0.0
    """weight of the KL penalty towards `ref_logprobs`"""
    kl_estimator: str = "k3"
    """k1: d; k2: d^2 / 2; k3: exp(-d) - 1 + d; abs: |d|, with d = logprob - ref_logprob; with "+"
    the value is that, the gradient that of k2"""
    use_bias_correction_kl: bool = False
    """multiply the KL estimate by the ratio, so that its gradient is unbiased (DeepSeek-V3.2)"""
    kl_max: float | None = None
    """the KL estimate of a token counts as at most this, without gradient beyond; verl: 10"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus: loss - entropy_coef * entropy"""
    entropy_aggregation: str = TOKEN_MEAN
    """how entropies are summed up; TRL: token-mean; verl: as the loss"""

    aggregation: str | None = None
    """overrides what `loss_type` implies; verl's names, see the table above"""
    normalizer: float | None = None
    """divisor of the whole step, see the table above; None: counted in the call"""
    entropy_normalizer: float | None = None
    """the same for the entropy bonus; None: `normalizer` where both are summed up alike. It counts
    all trained tokens, also where `top_entropy_quantile` leaves some out of the mean"""
    max_completion_length: int | None = None
    """constant length that seq-mean-token-sum-norm divides by"""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_numbers(self)
        _check_combinations(self)
        _check_unused(self)
        # kept, not made when asked for: torch.compile then has one string to guard
        object.__setattr__(self, "_packed", _pack(self))

    @property
    def packed(self) -> str:
        """Options that differ from their defaults, "name=value;name=value", without the divisors.

        This is how a spec gets into a graph of torch.compile. Divisors change from step to step
        and would make a new graph each time; they travel as numbers of their own.
        """
        return self._packed

    @classmethod
    def unpacked(
        cls, text: str, normalizer: float | None, entropy_normalizer: float | None
    ) -> PolicyLossSpec:
        """The spec with these `packed` options and divisors."""
        divisors = {"normalizer": normalizer, "entropy_normalizer": entropy_normalizer}
        return cls(**_options(text), **divisors)

    @classmethod
    def unpacked_options(cls, text: str) -> PolicyLossSpec:
        """The same where the divisors do not matter: they are 1."""
        return cls.unpacked(text, 1.0, 1.0)

    @property
    def formula(self) -> str:
        """Name of the token loss in the table."""
        return LOSS_TYPES[self.loss_type][0]

    @property
    def level(self) -> str:
        """Where the importance ratio lives; gspo is the clipped loss with a sequence ratio."""
        if self.loss_type in ("gspo", "geo_mean") and self.importance_sampling_level == "token":
            return "sequence"
        return self.importance_sampling_level

    @property
    def token_aggregation(self) -> str:
        """How token losses are summed up."""
        return self.aggregation or LOSS_TYPES[self.loss_type][1]

    @property
    def clip_low(self) -> float:
        """Smallest ratio that is not clipped."""
        return 1 - self.epsilon

    @property
    def clip_high(self) -> float:
        """Largest ratio that is not clipped."""
        return self.epsilon_high if self.formula == "cispo" else 1 + self.upper_epsilon

    @property
    def upper_epsilon(self) -> float:
        """`epsilon_high`, or `epsilon` where it is left out."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def scope(self) -> str:
        """What must be known before a token's coefficient is: its "token", its "sequence" or the
        whole "batch"."""
        if self.top_entropy_quantile < 1:
            return "batch"
        by_sequence = (
            self.level != "token"
            or self.formula == "vespo"
            or self.off_policy_mask_threshold is not None
            or (self.importance_sampling_mode or "").startswith("sequence")
        )
        return "sequence" if by_sequence else "token"


DIVISORS = ("normalizer", "entropy_normalizer")
"""options that `PolicyLossSpec.packed` leaves out"""


def _pack(spec: PolicyLossSpec) -> str:
    parts = []
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name in DIVISORS or value == field.default:
            continue
        if isinstance(value, str):
            parts.append(f"{field.name}='{value}'")
        elif value is None or isinstance(value, bool | int):
            parts.append(f"{field.name}={value}")
        else:
            # NumPy's numbers print their type as well
            parts.append(f"{field.name}={float(value)!r}")
    return ";".join(parts)


@lru_cache(maxsize=256)
def _options(text: str) -> dict[str, Any]:
    pairs = (part.split("=", 1) for part in text.split(";") if part)
    return {name: ast.literal_eval(value) for name, value in pairs}


_READERS: dict[str, tuple[str, ...]] = {
    "epsilon": ("clip", "cispo_two_sided", "geo_mean", "dppo_tv", "dppo_kl"),
    "epsilon_high": ("clip", "cispo", "cispo_two_sided", "geo_mean", "dppo_tv", "dppo_kl"),
    "delta": ("clip",),
    "clip_ratio_c": ("clip", "dppo_tv", "dppo_kl"),
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
    "vespo_k_pos": ("vespo",),
    "vespo_lambda_pos": ("vespo",),
    "vespo_k_neg": ("vespo",),
    "vespo_lambda_neg": ("vespo",),
    "dro_beta": ("dro",),
}
"""option -> formulas that read it"""

_DEPENDENT: dict[str, str] = {
    "importance_sampling_clip_max": "importance_sampling_mode",
    "importance_sampling_clip_min": "importance_sampling_mode",
    "kl_estimator": "beta",
    "use_bias_correction_kl": "beta",
    "kl_max": "beta",
    "entropy_aggregation": "entropy_coef",
}
"""option -> option without which it means nothing"""

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
    if not 0 < spec.top_entropy_quantile <= 1:
        raise ValueError(
            f"top_entropy_quantile={spec.top_entropy_quantile}: must be above 0 and at most 1, "
            "for example 0.2"
        )
    for name in ("delta", "clip_ratio_c"):
        bound = getattr(spec, name)
        if bound is not None and not bound > spec.clip_low:
            raise ValueError(
                f"{name}={bound}: must be above the lower clip {spec.clip_low}, for example 3.0"
            )


def _check_combinations(spec: PolicyLossSpec) -> None:
    if spec.formula == "cispo" and spec.epsilon_high is None:
        raise ValueError(
            "loss_type='cispo' needs epsilon_high: the largest ratio itself, for example 5.0"
        )
    if spec.formula == "dro" and spec.dro_beta is None:
        raise ValueError("loss_type='dro' needs dro_beta, for example 0.1")
    if spec.formula in ("vespo", "reinforce", "dro") and spec.importance_sampling_level != "token":
        raise ValueError(
            f"importance_sampling_level={spec.importance_sampling_level!r} has no effect on "
            f"loss_type={spec.loss_type!r}; leave it at 'token'"
        )
    if spec.formula == "geo_mean" and spec.importance_sampling_level == "sequence_token":
        raise ValueError("loss_type='geo_mean' has one ratio a completion; leave the level out")
    if spec.formula == "vespo" and (spec.importance_sampling_mode or "").startswith("sequence"):
        raise ValueError(
            f"importance_sampling_mode={spec.importance_sampling_mode!r}: loss_type='vespo' takes "
            "weights of tokens; use 'token_truncate' or 'token_mask'"
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
    for name, readers in _READERS.items():
        if getattr(spec, name) != defaults[name] and spec.formula not in readers:
            raise ValueError(
                f"{name}={getattr(spec, name)!r} has no effect on loss_type={spec.loss_type!r}; "
                f"leave it at {defaults[name]!r}"
            )
    for name, other in _DEPENDENT.items():
        if getattr(spec, name) != defaults[name] and not getattr(spec, other):
            raise ValueError(
                f"{name}={getattr(spec, name)!r} has no effect without {other}; "
                f"leave it at {defaults[name]!r}"
            )


def _one_of(name: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
