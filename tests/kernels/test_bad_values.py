"""Values at which arithmetic breaks: they spoil what they belong to and nothing else."""

from __future__ import annotations

import pytest
import torch
from operator_inputs import (
    FP32,
    LOSSES,
    ROWS,
    VOCAB,
    gradient,
    impls,
    losses,
    main_input,
    make,
    operators,
)
from torch.testing import assert_close

from polymath_fast.kernels import PolicyLossSpec, grpo_loss, linear_grpo_loss
from polymath_fast.kernels.policy_loss.spec import LOSS_TYPES


@operators
@impls
@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(op: str, impl: str, rows: int) -> None:
    logprobs, found = gradient(op, make(op, rows), impl=impl)
    assert logprobs.shape == (rows,) and len(found) == rows
    assert found.isfinite().all()


@losses
@impls
def test_one_trained_token_is_as_if_alone(op: str, impl: str) -> None:
    given = make(op)
    mask = torch.zeros(ROWS, dtype=torch.bool)
    _, nothing = gradient(op, {**given, "mask": mask}, impl=impl)
    assert not nothing.any()
    mask[4] = True
    _, found = gradient(op, {**given, "mask": mask}, impl=impl)
    alone = {n: t[4:5] if len(t) == ROWS else t for n, t in given.items()}
    alone |= {"advantages": torch.ones(1), "cu_seqlens": torch.tensor([0, 1])}
    assert_close(found[4:5], gradient(op, alone, impl=impl)[1])
    assert not found[~mask].any()


@operators
@impls
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_leaves_the_others_alone(op: str, impl: str, bad: float) -> None:
    given, name = make(op), main_input(op)
    if op in LOSSES:
        # a divisor of its own, and no gradient of the row in question
        options = {"spec": PolicyLossSpec(normalizer=1.0), "impl": impl}
    else:
        options = {"impl": impl}
    clean, expected = gradient(op, given, **options)
    broken = given[name].clone()
    broken[5] = bad
    logprobs, found = gradient(op, {**given, name: broken}, **options)
    good = torch.arange(ROWS) != 5
    assert logprobs[5].isnan()
    assert torch.equal(logprobs[good], clean[good])
    # one row less enters the products, which may then sum up in another order
    torch.testing.assert_close(found[good], expected[good], rtol=1e-5, atol=1e-6)
    assert not found[5].any()


@operators
@impls
def test_huge_and_equal_logits(op: str, impl: str) -> None:
    given = make(op, 3)
    if "logits" in given:
        logits = given["logits"]
        logits[0], logits[1], logits[2] = 7.0, 1e4 * logits[1].sign(), -1e4
    else:
        given["hidden"][0] = 0.0
        given["hidden"][1] *= 1e4
        given["hidden"][2] = 0.0
    logprobs, found = gradient(op, given, impl=impl)
    assert_close(logprobs[[0, 2]], torch.full((2,), VOCAB, dtype=FP32).log().neg())
    assert (logprobs <= 0).all() and found.isfinite().all()


@losses
@impls
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_overflow_at_masked_tokens(op: str, impl: str, loss_type: str) -> None:
    """0 * inf is NaN: a masked token must not enter any product."""
    given = make(op) | {"mask": torch.arange(ROWS) % 3 != 0}
    options = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    options |= {"max_completion_length": 8} if loss_type == "dr_grpo" else {}
    options |= {"dro_beta": 0.1} if loss_type == "dro" else {}
    spec = PolicyLossSpec(loss_type=loss_type, beta=0.1, **options)
    plain = torch.full((ROWS,), -2.0)
    results = []
    for far in (-2.0, -200.0, 1e3, -torch.inf, torch.nan):
        old = torch.where(given["mask"], plain, far)
        inputs = {**given, "old_logprobs": old, "ref_logprobs": old, "sampling_logprobs": old}
        results.append(gradient(op, inputs, spec=spec, impl=impl)[1])
    assert results[0].isfinite().all()
    for other in results[1:]:
        assert torch.equal(results[0], other)


@losses
@impls
@pytest.mark.parametrize("far", [1e3, -1e3])
def test_a_ratio_that_overflows_is_no_silent_nan(op: str, impl: str, far: float) -> None:
    given = make(op)
    old = torch.full((ROWS,), -2.0)
    old[2] = far
    out = {"grpo_loss": grpo_loss, "linear_grpo_loss": linear_grpo_loss}[op](
        **given, old_logprobs=old, impl=impl
    )
    _, found = gradient(op, {**given, "old_logprobs": old}, impl=impl)
    assert found.isfinite().all()
    assert out.loss.isfinite() or out.metrics["nonfinite_rows"] > 0


@losses
@impls
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_advantage_that_is_no_number_is_counted(op: str, impl: str, bad: float) -> None:
    given = make(op)
    given["advantages"] = torch.tensor([bad, 0.5])
    function = {"grpo_loss": grpo_loss, "linear_grpo_loss": linear_grpo_loss}[op]
    out = function(**given, impl=impl)
    assert not out.loss.isfinite()
    assert out.metrics["nonfinite_rows"] == ROWS // 2
    _, found = gradient(op, given, impl=impl)
    assert found.isfinite().all() and found[ROWS // 2 :].any() and not found[: ROWS // 2].any()
