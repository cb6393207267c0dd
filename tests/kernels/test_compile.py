"""torch.compile of code that calls the operators: one graph, and the bits of plain calls."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from compiled_runs import OPERATORS, ROWS, SPECS, VOCAB, assert_same_bits, batch_of, results, run
from heads import make_head
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from polymath_fast.kernels import (
    PolicyLossSpec,
    linear_grpo_loss,
    linear_logprobs,
    token_logprobs,
    use,
)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_graph_with_gradients_gives_the_same_bits(op: str, dtype: torch.dtype) -> None:
    """fp64 inputs take the reference, the others the CPU's kernels."""
    torch.compiler.reset()
    given = {} if op.endswith("logprobs") else batch_of(ROWS)
    head = make_head(ROWS, 16, VOCAB, dtype, bias=True)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_same_bits(results(compiled, op, head, **given), results(run, op, head, **given))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", ["policy_loss", "grpo_loss", "linear_grpo_loss"])
def test_every_kind_of_spec_crosses(op: str, spec: str) -> None:
    torch.compiler.reset()
    options, names = SPECS[spec]
    given = batch_of(ROWS, names) | {"spec": options}
    head = make_head(ROWS, 16, VOCAB, torch.float32)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_same_bits(results(compiled, op, head, **given), results(run, op, head, **given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vocab_tol_and_multiplicity_cross(dtype: torch.dtype) -> None:
    head = make_head(ROWS, 16, VOCAB, dtype)
    given = batch_of(ROWS) | {"multiplicity": torch.tensor([2.0, 1.0])}
    for tol in (0.01, "auto"):
        torch.compiler.reset()
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        ours, plain = (
            results(function, "linear_grpo_loss", head, vocab_tol=tol, **given)
            for function in (compiled, run)
        )
        assert "vocab/live_share" in plain and plain["tokens"].is_floating_point()
        assert_same_bits(ours, plain)


def test_a_spec_may_be_made_inside_the_graph() -> None:
    torch.compiler.reset()

    def inside(op: str, leaves: list[Tensor | None], targets: Tensor, **given: Any) -> Any:
        spec = PolicyLossSpec(loss_type="dapo", epsilon_high=0.28)
        return run(op, leaves, targets, spec=spec, **given)

    head, given = make_head(ROWS, 16, VOCAB, torch.float32), batch_of(ROWS, ("old_logprobs",))
    compiled = torch.compile(inside, backend="aot_eager", fullgraph=True)
    op = "linear_grpo_loss"
    assert_same_bits(results(compiled, op, head, **given), results(inside, op, head, **given))


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_the_default_backend_takes_it_too() -> None:
    torch.compiler.reset()

    def alone(op: str, leaves: list[Tensor | None], targets: Tensor, **given: Any) -> Any:
        out = linear_grpo_loss(*leaves[:2], targets, **given)
        return {"loss": out.loss, "logprobs": out.logprobs} | out.metrics

    head = make_head(ROWS, 16, VOCAB, torch.float32)
    given = batch_of(ROWS, ("old_logprobs",)) | {"spec": PolicyLossSpec(normalizer=11.0)}
    compiled = torch.compile(alone, fullgraph=True)
    assert_same_bits(results(compiled, "", head, **given), results(alone, "", head, **given))


@pytest.mark.parametrize("op", OPERATORS)
def test_new_lengths_and_divisors_compile_nothing(op: str) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    graphs = []
    for count in (12, 5, 9, 31, 4):
        head = make_head(count, 16, VOCAB, torch.float32)
        given = {}
        if not op.endswith("logprobs"):
            given = batch_of(count, ("old_logprobs",))
            torch._dynamo.mark_dynamic(given["old_logprobs"], 0)
            given["spec"] = PolicyLossSpec(loss_type="grpo", normalizer=float(count))
        torch._dynamo.mark_dynamic(head.hidden, 0)
        torch._dynamo.mark_dynamic(head.targets, 0)
        leaves = head.leaves()
        torch._dynamo.mark_dynamic(leaves[0], 0)
        found = compiled(op, leaves, head.targets, **given)
        assert torch.equal(found["loss"], run(op, leaves, head.targets, **given)["loss"])
        graphs.append(counter.frame_count)
    # the second divisor tells the compiler that it changes
    assert graphs == [1] * 5 if op.endswith("logprobs") else graphs == [1, 2, 2, 2, 2]


def test_a_default_set_later_counts() -> None:
    """`kernels.use` around a graph that is there already."""
    torch.compiler.reset()
    head = make_head(ROWS, 16, VOCAB, torch.bfloat16)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results(compiled, "linear_grpo_loss", head, **batch_of(ROWS))
    with use("reference"):
        ours, plain = (
            results(function, "linear_grpo_loss", head, **batch_of(ROWS))
            for function in (compiled, run)
        )
    assert_same_bits(ours, plain)


@pytest.mark.parametrize("op", ["token_logprobs", "linear_logprobs"])
@pytest.mark.parametrize("autocast", [False, True])
def test_without_gradients_there_is_one_graph(op: str, autocast: bool) -> None:
    torch.compiler.reset()
    head = make_head(ROWS, 16, VOCAB, torch.float32)

    def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if op == "token_logprobs":
                logprobs, entropy = token_logprobs(hidden @ weight.T, targets, temperature=0.7)
            else:
                logprobs, entropy = linear_logprobs(hidden, weight, targets)
        return logprobs * 2 + entropy

    compiled = torch.compile(score, backend="aot_eager", fullgraph=True)
    leaf = head.hidden.requires_grad_()
    for given in ((leaf, head.weight, head.targets), (leaf[:5], head.weight, head.targets[:5])):
        assert torch.equal(compiled(*given), score(*given))


def test_autocast_inside_the_graph() -> None:
    torch.compiler.reset()

    def under(*args: Any, **given: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return run(*args, **given)

    head, given = make_head(ROWS, 16, VOCAB, torch.float32), batch_of(ROWS)
    compiled = torch.compile(under, backend="aot_eager", fullgraph=True)
    op = "linear_grpo_loss"
    assert_same_bits(results(compiled, op, head, **given), results(under, op, head, **given))
