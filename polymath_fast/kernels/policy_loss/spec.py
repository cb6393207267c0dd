"""The options of a policy loss, by the names TRL gives them, checked when the spec is built."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

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
    "sapo": ("sapo", SEQUENCE_MEAN),
    "reinforce": ("reinforce", TOKEN_MEAN),
}
"""loss_type -> (formula, how tokens are summed up)"""

LEVELS = ("token", "sequence", "sequence_token")
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True, kw_only=True)
class PolicyLossSpec:
    """One policy loss: formula, clipping, KL penalty, entropy bonus, normalisation.

    Micro-batches: the operator returns sum over its tokens of (weight * token loss). With
    `normalizer=None` the weights are those of the tokens it was given. To split one step into
    several calls, give every call the same spec with the divisor of the whole step; losses, and
    gradients, of the calls then add up to those of one call, whatever the split:

    | aggregation (loss_type)                               | weight of a token      | `normalizer` D of the step              |
    |-------------------------------------------------------|------------------------|-----------------------------------------|
    | token-mean (dapo, bnpo, cispo, reinforce)             | 1 / D                  | trained tokens (mask True)              |
    | seq-mean-token-mean (grpo, gspo, sapo)                | 1 / (D * its length)   | completions                             |
    | seq-mean-token-sum-norm (dr_grpo)                     | 1 / (D * max_completion_length) | completions                    |
    | seq-mean-token-sum (luspo)                            | 1 / D                  | completions                             |
    | token-sum                                             | 1 / D                  | 1                                       |

    A completion must not be split over two calls when its length enters (seq-mean-token-mean) or
    when the ratio is that of the sequence. A call divides by at least 1, so an empty one is 0.
    """  # noqa: E501

    loss_type: str = "dapo"
    """which formula and aggregation, see `LOSS_TYPES`"""
    temperature: float = 1.0
    """divides the logits; log-probs and entropy are those of the scaled distribution"""

    epsilon: float = 0.2
    """the ratio may fall to 1 - epsilon"""
    epsilon_high: float | None = None
    """the ratio may rise to 1 + epsilon_high (None: epsilon); cispo: the largest ratio itself"""
    delta: float | None = None
    """upper bound of the unclipped ratio (INTELLECT-2), above 1 + epsilon_high"""
    importance_sampling_level: str = "token"
    """token; sequence (GSPO: one ratio a completion); sequence_token (that value, token slopes)"""
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    """sharpness of the soft gate where the advantage is positive / is not"""
    log_ratio_clamp: float | None = 20.0
    """log-ratios beyond it count as it and carry no gradient, so that exp never overflows"""

    beta: float = 0.0
    """weight of the KL penalty towards `ref_logprobs`"""
    kl_estimator: str = "k3"
    """k1: d; k2: d^2 / 2; k3: exp(-d) - 1 + d, with d = logprob - ref_logprob"""
    use_bias_correction_kl: bool = False
    """multiply the KL estimate by the ratio, so that its gradient is unbiased (DeepSeek-V3.2)"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus: loss - entropy_coef * mean entropy of the trained tokens"""

    aggregation: str | None = None
    """overrides what `loss_type` implies; verl's names, see the table above"""
    normalizer: float | None = None
    """divisor of the whole step, see above; None: counted in the call"""
    entropy_normalizer: float | None = None
    """trained tokens of the whole step; needed only where `normalizer` counts completions"""
    max_completion_length: int | None = None
    """constant length that seq-mean-token-sum-norm divides by"""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_unused()

    @property
    def formula(self) -> str:
        """Name of the token loss in the table."""
        return LOSS_TYPES[self.loss_type][0]

    @property
    def level(self) -> str:
        """Where the importance ratio lives; gspo is the clipped loss with a sequence ratio."""
        if self.loss_type == "gspo" and self.importance_sampling_level == "token":
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
        if self.formula == "cispo":
            return self.epsilon_high
        return 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)

    @property
    def scope(self) -> str:
        """What must be known before a token's coefficient is: its "token" or its "sequence"."""
        return "token" if self.level == "token" else "sequence"

    def _check_choices(self) -> None:
        _one_of("loss_type", self.loss_type, LOSS_TYPES)
        _one_of("importance_sampling_level", self.importance_sampling_level, LEVELS)
        _one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if self.aggregation is not None:
            _one_of("aggregation", self.aggregation, AGGREGATIONS)
        if self.formula == "cispo" and self.epsilon_high is None:
            raise ValueError(
                "loss_type='cispo' needs epsilon_high: the largest ratio itself, for example 5.0"
            )
        if self.token_aggregation == SEQUENCE_SUM_NORM and self.max_completion_length is None:
            raise ValueError(
                f"{self.loss_type} divides by max_completion_length, which is missing; "
                "give the sampler's limit, for example 1024"
            )
        if (
            self.entropy_coef
            and self.normalizer is not None
            and self.entropy_normalizer is None
            and self.token_aggregation != TOKEN_MEAN
        ):
            raise ValueError(
                f"entropy_coef with normalizer={self.normalizer} ({self.token_aggregation}) needs "
                "entropy_normalizer, the number of trained tokens of the whole step"
            )

    def _check_numbers(self) -> None:
        for name in ("temperature", "sapo_temperature_pos", "sapo_temperature_neg"):
            _positive(name, getattr(self, name))
        for name in ("normalizer", "entropy_normalizer", "max_completion_length"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if self.log_ratio_clamp is not None:
            _positive("log_ratio_clamp", self.log_ratio_clamp)
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon={self.epsilon}: must be between 0 and 1, for example 0.2")
        if self.epsilon_high is not None and not self.epsilon_high >= 0:
            raise ValueError(f"epsilon_high={self.epsilon_high}: must be >= 0, for example 0.28")
        if self.delta is not None and not self.delta > self.clip_high:
            raise ValueError(
                f"delta={self.delta}: must be above the upper clip {self.clip_high}, "
                f"for example {2 * self.clip_high}"
            )
        for name in ("beta", "entropy_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: must be finite, for example 0.001")

    def _check_unused(self) -> None:
        """An option that the chosen loss does not read is refused, never ignored."""
        defaults = {field.name: field.default for field in fields(self)}
        for name, readers in _READERS.items():
            if getattr(self, name) != defaults[name] and self.formula not in readers:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect on loss_type="
                    f"{self.loss_type!r}; leave it at {defaults[name]!r}"
                )


_READERS = {
    "epsilon": ("clip",),
    "epsilon_high": ("clip", "cispo"),
    "delta": ("clip",),
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
}


def _one_of(name: str, value: object, allowed: object) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value}: must be a finite number above 0")
