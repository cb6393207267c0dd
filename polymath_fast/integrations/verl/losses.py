"""verl's policy losses, by its names and its config, on the one table of losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from polymath_fast.kernels import PolicyLossSpec, policy_loss

PREFIX = "polymath_fast_"
LOSS_MODES: dict[str, dict[str, Any]] = {
    "vanilla": {"loss_type": "dapo"},
    "gspo": {
        "loss_type": "gspo",
        "importance_sampling_level": "sequence_token",
        "log_ratio_clamp": 10.0,
    },
    "geo_mean": {"loss_type": "geo_mean", "log_ratio_clamp": None},
    "cispo": {"loss_type": "cispo_two_sided"},
    "sapo": {"loss_type": "sapo"},
    "gpg": {"loss_type": "gpg"},
    "dro": {"loss_type": "dro", "log_ratio_clamp": None},
    "dppo_tv": {"loss_type": "dppo_tv"},
    "dppo_kl": {"loss_type": "dppo_kl"},
    "clip_cov": {"loss_type": "clip_cov", "log_ratio_clamp": None},
    "kl_cov": {"loss_type": "kl_cov", "log_ratio_clamp": None},
}
"""verl's loss_mode -> what does not depend on the config"""

_CLIPPED = ("vanilla", "gspo", "geo_mean", "cispo", "dppo_tv", "dppo_kl", "clip_cov")
_WITH_CEILING = {"vanilla": 3.0, "dppo_tv": 20.0, "dppo_kl": 20.0}
_OWN_FIELDS: dict[str, dict[str, float | None]] = {
    "dro": {"dro_beta": None},
    "clip_cov": {"clip_cov_ratio": 0.0002, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0},
    "kl_cov": {"kl_cov_ratio": 0.0002, "ppo_kl_coef": 1.0},
}
"""mode -> fields of `config.policy_loss` that it reads, and what verl takes for None"""
_BY_COMPLETION = ("sapo", "geo_mean")
VERSION = "0.9.1"
"""of verl, as the losses here are unless another one is named"""

PolicyLossFn = Callable[..., tuple[torch.Tensor, dict[str, float]]]


def policy_loss_fn(mode: str, version: str = VERSION) -> PolicyLossFn:
    """verl's loss `mode`, as `version` has it, as a function that its registry takes.

    The function has verl's arguments: old_log_prob, log_prob, advantages, response_mask and
    rollout_is_weights are (B, T); it returns the loss, 0-d, and verl's metrics.

    Raises:
        ValueError: a mode that is not in `LOSS_MODES` (bypass_mode chooses between others).
    """
    if mode not in LOSS_MODES:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(LOSS_MODES)}")

    def loss_fn(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        mask = response_mask.bool()
        spec = loss_spec(mode, loss_agg_mode, config, mask, version)
        # completions without a token are left out, so that a value a token is never taken for one
        # a completion; the spec's divisor counts what verl counts
        lengths = mask.sum(-1)
        lengths = lengths[lengths > 0]
        inputs = {
            "advantages": advantages[mask],
            "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            "old_logprobs": old_log_prob[mask],
        }
        if rollout_is_weights is not None:
            inputs["importance_weights"] = rollout_is_weights[mask]
        out = policy_loss(log_prob[mask], **inputs, spec=spec)
        return out.loss, _metrics(out.metrics, out.logprobs, inputs, spec, mode)

    loss_fn.__name__ = PREFIX + mode
    return loss_fn


def loss_spec(
    mode: str,
    loss_agg_mode: str,
    config: Any,
    response_mask: torch.Tensor,
    version: str = VERSION,
) -> PolicyLossSpec:
    """What verl's ActorConfig and its `global_batch_info` say about a loss.

    Args:
        response_mask: (B, T) bool, of the micro-batch.
        version: of verl; in 0.9.0 gspo is a mean of completions, whatever `loss_agg_mode` says.

    Raises:
        ValueError: an aggregation or a number outside its range.
    """
    options = dict(LOSS_MODES[mode])
    if mode in _CLIPPED:
        low, high = config.clip_ratio_low, config.clip_ratio_high
        options["epsilon"] = config.clip_ratio if low is None else low
        options["epsilon_high"] = config.clip_ratio if high is None else high
    if mode in _WITH_CEILING:
        options["clip_ratio_c"] = config.get("clip_ratio_c", _WITH_CEILING[mode])
    if mode == "sapo":
        options |= {"sapo_temperature_pos": config.tau_pos, "sapo_temperature_neg": config.tau_neg}
    for name, default in _OWN_FIELDS.get(mode, {}).items():
        value = getattr(config.policy_loss, name)
        options[name] = default if value is None else value
    by_completion = mode in _BY_COMPLETION or (mode, version) == ("gspo", "0.9.0")
    aggregation = "seq-mean-token-mean" if by_completion else loss_agg_mode
    info = config.global_batch_info
    normalizer = _normalizer(aggregation, info, response_mask)
    if mode == "geo_mean":  # verl takes the plain mean of the micro-batch, whatever the step holds
        normalizer = float(max(len(response_mask), 1))
    if aggregation == "seq-mean-token-sum-norm":
        options["max_completion_length"] = info.get("loss_scale_factor") or response_mask.shape[-1]
    return PolicyLossSpec(aggregation=aggregation, normalizer=normalizer, **options)


def _normalizer(aggregation: str, info: dict[str, Any], response_mask: torch.Tensor) -> float:
    """What divides the sum; over `dp_size` because gradients are averaged over that many ranks."""
    size = info.get("dp_size") or 1
    if aggregation == "token-sum":
        return 1 / size
    by_token = aggregation == "token-mean"
    name = "batch_num_tokens" if by_token else "global_batch_size"
    counted = info.get(name)
    if counted is None:
        if size > 1:
            raise ValueError(f"dp_size={size} needs {name} in global_batch_info")
        counted = response_mask.sum() if by_token else response_mask.any(-1).sum()
    return max(float(counted), 1.0) / size


def _metrics(
    metrics: dict[str, torch.Tensor],
    logprobs: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    spec: PolicyLossSpec,
    mode: str,
) -> dict[str, float]:
    """verl's names; all values leave the device together."""
    if mode == "gpg":
        return {}
    moved = logprobs - inputs["old_logprobs"]
    distance = moved.abs() if mode == "kl_cov" else -moved
    values = {"actor/ppo_kl": distance.sum() / max(len(moved), 1)}
    clipped = "covariance/chosen_share" if mode == "clip_cov" else "clip_ratio/region"
    if clipped in metrics:
        values["actor/pg_clipfrac"] = metrics[clipped]
    if mode == "vanilla":
        cut = (moved > math.log(spec.clip_ratio_c)) & (inputs["advantages"] < 0)
        values["actor/pg_clipfrac_lower"] = cut.sum() / max(len(moved), 1)
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
