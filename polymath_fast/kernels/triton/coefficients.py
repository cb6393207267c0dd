"""When a token's coefficient can be had before its log-prob is known.

On-policy and without a KL penalty the ratio is 1 whatever the log-prob: d loss / d logprob follows
from advantage and weight alone. A kernel can then write a row's gradient while it still holds the
row. Whether that is so is asked of the table of policy losses, not decided here a second time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from polymath_fast.kernels.policy_loss import (
    PolicyBatch,
    PolicyLossSpec,
    PolicyTerms,
    policy_terms,
    prepare,
)

_OPTIONAL = ("old_logprobs", "ref_logprobs", "sampling_logprobs", "importance_weights")
_PROBES = (-1e-3, -0.5, -1.0, -1.1, -1.5, -5.0, -40.0, -1e4)


def known_beforehand(batch: PolicyBatch, spec: PolicyLossSpec) -> PolicyTerms | None:
    """`policy_terms` with the right coefficients and no right losses; None where they need more."""
    if spec.scope == "batch":
        return None
    if not _probe(spec, _given(batch)).known:
        return None
    nothing = torch.zeros_like(batch.weights)
    return policy_terms(batch, nothing, nothing, spec)


def may_have_gradient(batch: PolicyBatch, spec: PolicyLossSpec) -> torch.Tensor:
    """(N,) bool: False only where a token's coefficients are zero whatever its log-prob."""
    live = batch.mask & (batch.weights != 0)
    if not spec.entropy_coef and _probe(spec, _given(batch)).by_advantage:
        live = live & (batch.advantages != 0)
    return live


def _given(batch: PolicyBatch) -> tuple[str, ...]:
    return tuple(name for name in _OPTIONAL if getattr(batch, name) is not None)


class _Facts(NamedTuple):
    """What the coefficients of a spec depend on."""

    known: bool
    """on no log-prob"""
    by_advantage: bool
    """they are 0 where the advantage is"""


@lru_cache(maxsize=256)
def _probe(spec: PolicyLossSpec, given: tuple[str, ...]) -> _Facts:
    """Found out on tokens whose log-probs are far apart."""
    found = _coefficients(spec, given)
    known = not any((found[advantage] != found[advantage][0]).any() for advantage in (1.0, -1.0))
    return _Facts(known, by_advantage=not found[0.0].any())


def _coefficients(spec: PolicyLossSpec, given: tuple[str, ...]) -> dict[float, torch.Tensor]:
    """Advantage -> coefficients, NaN where undefined."""
    count = 2 * len(_PROBES)
    logprobs = torch.tensor(_PROBES, dtype=torch.float64).repeat(2)
    fixed = torch.full_like(logprobs, -1.0)
    optional = {name: fixed for name in given}
    if "importance_weights" in given:
        optional["importance_weights"] = torch.full_like(logprobs, 0.5)
    found = {}
    for advantage in (1.0, -1.0, 0.0):
        batch = prepare(
            spec,
            count,
            torch.float64,
            torch.device("cpu"),
            torch.full_like(logprobs, advantage),
            torch.arange(0, count + 1, 2),
            **optional,
        )
        terms = policy_terms(batch, logprobs, fixed, spec)
        found[advantage] = torch.where(terms.unsound, torch.nan, terms.coefficient)
    return found
