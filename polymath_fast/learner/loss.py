"""The policy loss that a run's settings describe, and its call on a packed batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from polymath_fast.config import Config
from polymath_fast.kernels import PolicyLossOutput, PolicyLossSpec, linear_grpo_loss
from polymath_fast.learner.mismatch import finite_or_none
from polymath_fast.learner.packing import PackedBatch

if TYPE_CHECKING:
    from polymath_fast.kernels.cpu.recorded_head import RecordedPredictions


@dataclass(frozen=True)
class Divisors:
    """What the loss of one update is divided by, whatever part of it enters the model."""

    tokens: int
    completions: int


def loss_spec(config: Config, divisors: Divisors | None = None) -> PolicyLossSpec:
    """The policy loss that the settings describe; with `divisors` it may be split over calls."""
    several, luspo = config.updates_per_batch > 1, config.loss_type == "luspo"
    spec = PolicyLossSpec(
        loss_type=config.loss_type,
        temperature=config.temperature,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        delta=config.delta,
        # where the ratio is 1 its level makes no difference, and token by token is one pass
        importance_sampling_level="sequence" if several and luspo else "token",
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


def packed_loss(
    head: nn.Linear,
    hidden: Tensor,
    batch: PackedBatch,
    spec: PolicyLossSpec,
    vocab_tol: float | str,
    predictions: RecordedPredictions | None = None,
    states: Tensor | None = None,
) -> PolicyLossOutput:
    """The loss of `batch`, whose targets the states `hidden` (N, H) predict through `head`; from
    `predictions` where there are any, and no logits are computed, with rows `states` (N,) of
    `hidden` (S, H)."""
    loss = linear_grpo_loss
    if predictions is not None:
        from polymath_fast.kernels.linear_grpo_loss.recorded import recorded_grpo_loss

        loss = partial(recorded_grpo_loss, recorded=predictions, states=states)
    return loss(
        hidden,
        head.weight,
        batch.targets,
        batch.advantages,
        batch.cu_seqlens,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        sampling_logprobs=batch.sampling_logprobs,
        multiplicity=batch.multiplicity,
        bias=head.bias,
        spec=spec,
        vocab_tol=vocab_tol,
    )
