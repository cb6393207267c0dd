"""Dropping vocabulary columns: the error that is made stays below the bound that is reported."""

from __future__ import annotations

import pytest
import torch
from closeness import relative_error
from heads import Head, make_head

from polymath_fast.kernels import PolicyLossSpec, linear_grpo_loss
from polymath_fast.kernels.active_vocabulary import ROUNDING

ROWS, VOCAB = 400, 3000


def _head(live: int) -> Head:
    """A head whose rows all prefer the same `live` tokens, as rollouts of one prompt do."""
    head = make_head(ROWS, 64, VOCAB, spread=1.5)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(5)).bfloat16()
    direction /= direction.norm()
    head.hidden += 6 * direction
    head.weight[:live] += 2 * direction
    head.targets = torch.randint(live, (ROWS,), generator=torch.Generator().manual_seed(6))
    return head


def _gradients(head: Head, **options: object) -> tuple[dict, list[torch.Tensor]]:
    leaves = head.leaves(torch.float32) if options.pop("wide", False) else head.leaves()
    advantages = torch.randn(4, generator=torch.Generator().manual_seed(7))
    offsets = torch.tensor([0, 50, 160, 300, ROWS], dtype=torch.int32)
    out = linear_grpo_loss(
        leaves[0], leaves[1], head.targets, advantages, offsets, spec=PolicyLossSpec(), **options
    )
    out.loss.backward()
    return out.metrics, [leaf.grad.double() for leaf in leaves[:2]]


@pytest.mark.parametrize("tol", [1e-3, "auto"])
def test_the_reference_keeps_every_column_and_says_so(tol: float | str) -> None:
    head = _head(live=150)
    ours, _ = _gradients(head, vocab_tol=tol)
    metrics, some = _gradients(head, vocab_tol=tol, impl="reference")
    _, exact = _gradients(head, impl="reference")
    assert metrics.keys() == ours.keys()
    assert metrics["vocab/live_share"] == 1 and metrics["vocab/error_bound"] == 0
    assert all(torch.equal(a, b) for a, b in zip(some, exact, strict=True))


@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "fp32"])
def test_auto_keeps_the_error_below_rounding(wide: bool) -> None:
    head = _head(live=150)
    _, exact = _gradients(head, wide=wide)
    metrics, some = _gradients(head, wide=wide, vocab_tol="auto")
    assert metrics["vocab/live_share"] < 0.1
    assert 0 < metrics["vocab/dropped_mass"] < ROUNDING
    bound = float(metrics["vocab/error_bound"])
    assert 0 < bound <= ROUNDING
    # each side was rounded to its dtype once
    rounding = 0.0 if wide else ROUNDING
    assert max(relative_error(a, b) for a, b in zip(some, exact, strict=True)) <= bound + rounding
    assert not torch.equal(some[1], exact[1])


def test_auto_is_exact_where_too_many_columns_matter() -> None:
    head = make_head(ROWS, 64, VOCAB, spread=0.5)
    _, exact = _gradients(head)
    metrics, some = _gradients(head, vocab_tol="auto")
    assert metrics["vocab/live_share"] == 1
    assert metrics["vocab/error_bound"] == 0
    assert all(torch.equal(a, b) for a, b in zip(some, exact, strict=True))


def test_a_number_drops_exactly_the_columns_below_it() -> None:
    head = _head(live=150)
    _, exact = _gradients(head, wide=True)
    metrics, some = _gradients(head, wide=True, vocab_tol=2e-4)
    dropped = (some[1] == 0).all(1) & (exact[1] != 0).any(1)
    assert 0 < dropped.sum() < VOCAB - 150
    assert float(metrics["vocab/live_share"]) == pytest.approx(1 - float(dropped.double().mean()))
    assert torch.equal(some[1][~dropped], exact[1][~dropped])
    assert relative_error(some[0], exact[0]) <= float(metrics["vocab/error_bound"])
    assert relative_error(some[1], exact[1]) <= float(metrics["vocab/error_bound"])
    assert float(metrics["vocab/error_bound"]) < 0.2
