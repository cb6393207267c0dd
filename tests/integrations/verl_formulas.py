"""verl's policy losses, written down once more, and a run of one of them or of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)

OF_POLICY_LOSS = {
    "dro_beta": 0.3,
    "clip_cov_ratio": 1.0,  # of all candidates none is left to draw
    "clip_cov_lb": 0.1,
    "clip_cov_ub": 1.0,
    "kl_cov_ratio": 0.3,
    "ppo_kl_coef": 0.7,
}


@dataclass
class Config:
    """The fields of verl's ActorConfig that its losses read."""

    clip_ratio: float = 0.2
    clip_ratio_low: float | None = 0.15
    clip_ratio_high: float | None = 0.28
    clip_ratio_c: float = 1.6
    tau_pos: float = 1.0
    tau_neg: float = 1.2
    policy_loss: Any = field(default_factory=lambda: SimpleNamespace(**OF_POLICY_LOSS))
    global_batch_info: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


@dataclass
class Batch:
    """(B, T) each, fp64."""

    log_prob: torch.Tensor
    old: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor


def _aggregate(values: torch.Tensor, mask: torch.Tensor, how: str, info: dict) -> torch.Tensor:
    """verl's agg_loss."""
    mask, size = mask.double(), info.get("dp_size", 1)
    tokens = info.get("batch_num_tokens") or mask.sum()
    lengths = mask.sum(-1)
    sequences = info.get("global_batch_size") or (lengths > 0).sum()
    by_sequence = (values * mask).sum(-1)
    return (
        size
        * {
            "token-mean": by_sequence.sum() / tokens,
            "token-sum": by_sequence.sum(),
            "seq-mean-token-mean": (by_sequence / (lengths + 1e-8)).sum() / sequences,
            "seq-mean-token-sum": by_sequence.sum() / sequences,
            "seq-mean-token-sum-norm": by_sequence.sum()
            / sequences
            / (info.get("loss_scale_factor") or mask.shape[-1]),
        }[how]
    )


def _clipped(b: Batch, config: Config, ratio: torch.Tensor) -> torch.Tensor:
    clamped = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    return torch.maximum(-b.advantages * ratio, -b.advantages * clamped)


def _vanilla(b: Batch, c: Config) -> torch.Tensor:
    loss = _clipped(b, c, (b.log_prob - b.old).exp())
    dual = torch.minimum(loss, -c.clip_ratio_c * b.advantages)
    return torch.where(b.advantages < 0, dual, loss)


def _gspo(b: Batch, c: Config) -> torch.Tensor:
    mean = ((b.log_prob - b.old) * b.mask).sum(-1) / b.mask.sum(-1).clamp(min=1)
    through_token = b.log_prob - b.log_prob.detach() + mean.detach()[:, None]
    return _clipped(b, c, through_token.exp())


def _dppo(b: Batch, c: Config, rose: torch.Tensor, fell: torch.Tensor) -> torch.Tensor:
    cut = torch.where(b.advantages > 0, rose, fell)
    ratio = (b.log_prob - b.old).exp().clamp(max=c.clip_ratio_c).detach()
    return -b.advantages * ratio * b.log_prob * ~cut


def _dppo_tv(b: Batch, c: Config) -> torch.Tensor:
    moved = (b.log_prob.exp() - b.old.exp()).detach()
    return _dppo(b, c, moved > c.clip_ratio_high, moved < -c.clip_ratio_low)


def _dppo_kl(b: Batch, c: Config) -> torch.Tensor:
    p, q = b.log_prob.detach().exp(), b.old.exp()
    kl = q * (q / p).log() + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    return _dppo(b, c, (kl > c.clip_ratio_high) & (p > q), (kl > c.clip_ratio_low) & (p < q))


def _sapo(b: Batch, c: Config) -> torch.Tensor:
    tau = torch.where(b.advantages > 0, c.tau_pos, c.tau_neg)
    ratio = (b.log_prob - b.old).exp()
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * b.advantages


def _cispo(b: Batch, c: Config) -> torch.Tensor:
    ratio = (b.log_prob - b.old).exp().clamp(1 - c.clip_ratio_low, 1 + c.clip_ratio_high)
    return -ratio.detach() * b.advantages * b.log_prob


def _covariance(b: Batch) -> torch.Tensor:
    a, x = (torch.where(b.mask, t.detach(), torch.nan) for t in (b.advantages, b.log_prob))
    return (a - a.nanmean()) * (x - x.nanmean())


def clip_cov_candidates(b: Batch, c: Config) -> torch.Tensor:
    """(B, T) bool: what verl draws from."""
    ratio, p = (b.log_prob - b.old).exp(), c.policy_loss
    above = (b.advantages > 0) & (ratio > 1 + c.clip_ratio_high)
    below = (b.advantages < 0) & (ratio < 1 - c.clip_ratio_low)
    found = _covariance(b)
    return (found > p.clip_cov_lb) & (found < p.clip_cov_ub) & ~above & ~below


def _clip_cov(b: Batch, c: Config) -> torch.Tensor:
    assert c.policy_loss.clip_cov_ratio == 1
    return _clipped(b, c, (b.log_prob - b.old).exp()) * ~clip_cov_candidates(b, c)


def _kl_cov(b: Batch, c: Config) -> torch.Tensor:
    log_ratio, found = b.log_prob - b.old, _covariance(b)
    count = max(1, int(c.policy_loss.kl_cov_ratio * b.mask.sum().item()))
    least = found[b.mask].topk(count).values[-1]
    penalty = c.policy_loss.ppo_kl_coef * log_ratio.abs() * (found >= least)
    return penalty - b.advantages * log_ratio.exp()


FORMULAS: dict[str, Callable[[Batch, Config], torch.Tensor]] = {
    "vanilla": _vanilla,
    "gspo": _gspo,
    "dppo_tv": _dppo_tv,
    "dppo_kl": _dppo_kl,
    "sapo": _sapo,
    "cispo": _cispo,
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
    "gpg": lambda b, c: -b.advantages * b.log_prob,
    "dro": lambda b, c: (
        0.5 * c.policy_loss.dro_beta * (b.log_prob - b.old).square() - b.advantages * b.log_prob
    ),
}
"""token losses, written down from research; geo_mean has no token loss"""


def loss_by_formula(
    mode: str, how: str, b: Batch, c: Config, weighted: bool, version: str = "0.9.1"
) -> torch.Tensor:
    weights = b.weights if weighted else torch.ones_like(b.weights)
    if mode == "geo_mean":
        sign, log_ratio = b.advantages.sign(), b.log_prob - b.old
        clamped = log_ratio.clamp(-c.clip_ratio_low, c.clip_ratio_high)
        least = sign * torch.min(sign * log_ratio, sign * clamped)
        lengths = b.mask.sum(-1) + 1e-8
        ratio = ((least * b.mask).sum(-1) / lengths).exp()
        advantage = (b.advantages * b.mask).sum(-1) / lengths
        weight = (((weights + 1e-10).log() * b.mask).sum(-1) / lengths).exp()
        return (-advantage * ratio * weight).mean()
    if mode == "sapo" or (mode == "gspo" and version == "0.9.0"):
        how = "seq-mean-token-mean"
    return _aggregate(FORMULAS[mode](b, c) * weights, b.mask, how, c.global_batch_info)


def run_loss(function: Callable, how: str, b: Batch, c: Any, weighted: bool) -> tuple:
    loss, metrics = function(
        old_log_prob=b.old,
        log_prob=b.log_prob,
        advantages=b.advantages,
        response_mask=b.mask,
        loss_agg_mode=how,
        config=c,
        rollout_is_weights=b.weights if weighted else None,
    )
    return loss.detach(), torch.autograd.grad(loss, b.log_prob)[0], metrics
