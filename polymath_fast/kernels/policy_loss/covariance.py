"""Tokens chosen by covariance: the few whose update lowers the entropy of the policy most.

A likely token with a good advantage, or an unlikely one with a bad advantage, makes the policy
surer of itself. How much is the product of the two, each less its mean over all trained tokens
(arXiv 2505.22617, equation 10). Sums and products are fp64, so that no rounding reorders tokens.
"""

from __future__ import annotations

import torch

from polymath_fast.kernels.policy_loss.packed import steady_sum

_WORD = 2**32 - 1


def covariances(
    logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """(N,) fp64; NaN at untrained tokens and those without a finite log-prob or advantage, which
    the means leave out."""
    counted = mask & logprobs.isfinite() & advantages.isfinite()
    count = counted.sum().clamp(min=1)

    def centred(values: torch.Tensor) -> torch.Tensor:
        values = torch.where(counted, values.double(), 0)
        return values - steady_sum(values) / count

    return torch.where(counted, centred(advantages) * centred(logprobs), torch.nan)


def largest(covariance: torch.Tensor, share: float) -> torch.Tensor:
    """(N,) bool: this share of the tokens that have a `covariance` (N,), at least one, those with
    the largest; of equal ones the earlier.

    Source: KL-Cov, arXiv 2505.22617.
    """
    known = ~covariance.isnan()
    return _first(-covariance, known, _count(known, share))


def drawn_between(
    covariance: torch.Tensor, allowed: torch.Tensor, low: float, high: float, share: float
) -> torch.Tensor:
    """(N,) bool: this share of the tokens that have a `covariance` (N,), at least one, drawn from
    the `allowed` (N,) ones between `low` and `high`; all of these where they are fewer.

    The draw follows from N and the tokens' places, whatever the device: the same call chooses the
    same tokens, no generator is read, and a rounding of log-probs does not change their order.

    Source: Clip-Cov, arXiv 2505.22617.
    """
    candidates = allowed & (covariance > low) & (covariance < high)
    order = _shuffled(len(covariance), covariance.device).double()
    return _first(order, candidates, _count(~covariance.isnan(), share))


def _count(counted: torch.Tensor, share: float) -> torch.Tensor:
    """0-d: `share` of the tokens in `counted`, rounded down as Python's int does, at least 1."""
    return (counted.sum().double() * share).floor().clamp(min=1)


def _first(order: torch.Tensor, candidates: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """(N,) bool: the `count` candidates of the lowest `order`; no device is asked for a number."""
    places = torch.where(candidates, order, torch.inf).sort(stable=True).indices
    ranks = torch.empty_like(places)
    ranks.scatter_(0, places, torch.arange(len(places), device=places.device))
    return candidates & (ranks < count)


def _shuffled(count: int, device: torch.device) -> torch.Tensor:
    """(count,) int64, distinct and below 2^32: places in the call through a 32-bit mixer, from a
    start that another `count` moves."""
    mixed = torch.arange(count, device=device) + (count * 0x9E3779B1 & _WORD) & _WORD
    for _ in range(2):
        mixed = (mixed ^ mixed >> 16) * 0x45D9F3B & _WORD
    return mixed ^ mixed >> 16
