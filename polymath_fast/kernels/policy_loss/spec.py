"""The options of a policy loss, by the names TRL gives them, checked when the spec is built."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from polymath_fast.kernels import loss_choices
from polymath_fast.kernels.loss_choices import (
    AGGREGATIONS,
    BY_COVARIANCE,
    CORRECTIONS,
    KL_ESTIMATORS,
    LEVELS,
    LOSS_TYPES,
    SEQUENCE_MEAN,
    SEQUENCE_SUM,
    SEQUENCE_SUM_NORM,
    TOKEN_MEAN,
    TOKEN_SUM,
)
from polymath_fast.kernels.policy_loss.spec_checks import check

__all__ = [
    "AGGREGATIONS",
    "CORRECTIONS",
    "DIVISORS",
    "KL_ESTIMATORS",
    "LEVELS",
    "LOSS_TYPES",
    "PolicyLossSpec",
    "SEQUENCE_MEAN",
    "SEQUENCE_SUM",
    "SEQUENCE_SUM_NORM",
    "TOKEN_MEAN",
    "TOKEN_SUM",
]


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
    |                         | reinforce dro dppo_* *_cov |                      |                |
    | seq-mean-token-mean     | grpo gspo sapo geo_mean    | 1 / (D own length)   | completions    |
    | seq-mean-token-sum      | luspo                      | 1 / D                | completions    |
    | seq-mean-token-sum-norm | dr_grpo                    | 1 / (D max_c._length)| completions    |
    | token-sum               |                            | 1 / D                | nothing: 1     |

    A completion must stay in one call unless the aggregation is token-mean or token-sum and the
    `scope` is "token". `top_entropy_quantile`, and what clip_cov and kl_cov choose, is always taken
    over the tokens of the call.
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
    clip_cov_ratio: float = 0.0002
    """clip_cov: share of the call's tokens that get no gradient, see `covariance.drawn_between`"""
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    """bounds of the covariance between which they are drawn"""
    kl_cov_ratio: float = 0.0002
    """kl_cov: share of the call's tokens, those of largest covariance, that pay for their ratio"""
    ppo_kl_coef: float = 0.1
    """what they pay: this times |log ratio|"""

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
    """the KL estimate of a token counts as at most this, without gradient beyond, but for the "+"
    ones; verl: 10"""
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
        check(self)
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
        return loss_choices.formula(self.loss_type)

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
        if self.top_entropy_quantile < 1 or self.formula in BY_COVARIANCE:
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
            # NumPy's numbers print their type as well, and infinity is no literal
            parts.append(f"{field.name}={'1e999' if value == math.inf else repr(float(value))}")
    return ";".join(parts)


@lru_cache(maxsize=256)
def _options(text: str) -> dict[str, Any]:
    pairs = (part.split("=", 1) for part in text.split(";") if part)
    return {name: ast.literal_eval(value) for name, value in pairs}
