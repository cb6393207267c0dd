"""torch.compile of code that calls the operators: it works, and gives what plain calls give."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from heads import Head, make_head
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from polymath_fast.kernels import (
    PolicyLossSpec,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    policy_loss,
    token_logprobs,
    use,
)
from polymath_fast.kernels.checks import working_dtype
from polymath_fast.kernels.policy_loss.compiled import crossing

ROWS, VOCAB = 12, 70
OPERATORS = ("token_logprobs", "linear_logprobs", "grpo_loss", "linear_grpo_loss", "policy_loss")


def step(op: str, hidden: Tensor, weight: Tensor, targets: Tensor, rewards: Tensor) -> Tensor:
    """A loss as a trainer's own code would make it, with other operations around the operator."""
    states = torch.tanh(hidden)
    advantages = group_advantages(rewards, 2)
    ends = torch.tensor([0, 5, ROWS], dtype=torch.int32)
    if op == "token_logprobs":
        logprobs, entropy = token_logprobs(states @ weight.T, targets, temperature=0.7)
        return (logprobs + entropy).mean()
    if op == "linear_logprobs":
        logprobs, entropy = linear_logprobs(states, weight, targets)
        return (logprobs + entropy).mean()
    if op == "grpo_loss":
        return grpo_loss(states @ weight.T, targets, advantages, ends).loss * 2
    if op == "linear_grpo_loss":
        spec = PolicyLossSpec(entropy_coef=0.1)
        out = linear_grpo_loss(states, weight, targets, advantages, ends, spec=spec)
        return out.loss + out.metrics["entropy"]
    logprobs = torch.log_softmax(states @ weight.T, -1).gather(-1, targets[:, None])[:, 0]
    return policy_loss(logprobs, advantages, ends, old_logprobs=logprobs.detach() - 0.1).loss


@pytest.mark.parametrize("op", OPERATORS)
def test_an_operator_without_a_compiled_form_breaks_the_graph(op: str) -> None:
    """`group_advantages` runs between two graphs."""
    torch.compiler.reset()
    head = make_head(ROWS, 16, VOCAB, torch.float32)
    rewards = torch.tensor([1.0, 0.0])
    results = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
        loss = function(op, hidden, weight, head.targets, rewards)
        loss.backward()
        results.append([loss.detach(), hidden.grad, weight.grad])
    for ours, plain in zip(*results, strict=True):
        assert_close(ours, plain)


def test_errors_come_through() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: token_logprobs(*given)[0], backend="eager")
    with pytest.raises(ValueError, match="outside"):
        compiled(torch.zeros(2, 5), torch.tensor([0, 5]))


SPECS = {
    "on-policy": (PolicyLossSpec(), ()),
    "kl and bonus": (
        PolicyLossSpec(loss_type="grpo", beta=0.1, entropy_coef=0.05, temperature=0.7),
        ("old_logprobs", "ref_logprobs"),
    ),
    "gspo": (PolicyLossSpec(loss_type="gspo"), ("old_logprobs", "mask")),
    "sequence weights": (
        PolicyLossSpec(importance_sampling_mode="sequence_mask"),
        ("old_logprobs", "sampling_logprobs"),
    ),
    "divisors": (PolicyLossSpec(normalizer=37.0), ("importance_weights",)),
}


def batch_of(count: int, names: tuple[str, ...] = ()) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    given = {name: -3 * torch.rand(count, generator=generator) for name in names}
    if "mask" in given:
        given["mask"] = torch.rand(count, generator=generator) > 0.2
    if "importance_weights" in given:
        given["importance_weights"] = torch.rand(count, generator=generator)
    ends = torch.tensor([0, count // 3, count], dtype=torch.int32)
    return given | {"advantages": torch.tensor([1.0, -0.5]), "cu_seqlens": ends}


def run(op: str, leaves: list[Tensor | None], targets: Tensor, **given: Any) -> dict[str, Tensor]:
    """Loss, results and metrics of an operator between other operations, as a model has them."""
    hidden, weight, bias = leaves
    hidden = torch.tanh(hidden)
    if op == "token_logprobs":
        logits = torch.nn.functional.linear(hidden, weight, bias)
        logprobs, entropy = token_logprobs(logits, targets, temperature=0.7)
        return {"loss": (logprobs * 0.3 + entropy.square()).sum()}
    if op == "linear_logprobs":
        logprobs, entropy = linear_logprobs(hidden, weight, targets, bias=bias, temperature=0.7)
        return {"loss": (logprobs * 0.3 + entropy.square()).sum()}
    if op == "linear_grpo_loss":
        out = linear_grpo_loss(hidden, weight, targets, bias=bias, **given)
    elif op == "grpo_loss":
        out = grpo_loss(torch.nn.functional.linear(hidden, weight, bias), targets, **given)
    else:
        log_p = torch.nn.functional.linear(hidden, weight, bias).float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        out = policy_loss(log_p.gather(-1, targets[:, None])[:, 0], entropy=entropy, **given)
    return {"loss": out.loss, "logprobs": out.logprobs, "entropies": out.entropy} | out.metrics


def results(function: Any, op: str, head: Head, **given: Any) -> dict[str, Tensor]:
    """The same with the gradients of hidden, weight and bias."""
    leaves = head.leaves()
    found = function(op, leaves, head.targets, **given)
    found["loss"].backward()
    names = ("d_hidden", "d_weight", "d_bias")
    gradients = {n: leaf.grad for n, leaf in zip(names, leaves, strict=True) if leaf is not None}
    return {name: value.detach() for name, value in found.items()} | gradients


def assert_same_bits(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert list(ours) == list(plain)
    for name, value in plain.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


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


def test_bad_input_of_a_loss_comes_through() -> None:
    torch.compiler.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    head, given = make_head(ROWS, 16, VOCAB, torch.float32), batch_of(ROWS)
    given["cu_seqlens"] = torch.tensor([0, 4, ROWS - 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="must rise from 0"):
        compiled("linear_grpo_loss", head.leaves(), head.targets, **given)
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        given = batch_of(ROWS) | {"spec": PolicyLossSpec(beta=0.1)}
        compiled("grpo_loss", head.leaves(), head.targets, **given)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_registered_operators_keep_their_word(dtype: torch.dtype) -> None:
    head = make_head(ROWS, 16, VOCAB, dtype, bias=True)
    registered = torch.ops.polymath_fast
    hidden, weight, bias = head.leaves()
    logits = (head.hidden @ head.weight.T).requires_grad_()
    g = torch.rand(ROWS, dtype=working_dtype(dtype))
    rest = (head.targets, 0.7, "auto")
    check = torch.library.opcheck
    check(registered.token_logprobs.default, (logits, *rest))
    check(registered.linear_logprobs.default, (hidden, weight, head.targets, bias, *rest[1:]))
    logits, hidden, weight, bias = (t.detach() for t in (logits, hidden, weight, bias))
    for slopes in ((g, None), (None, g), (g, g)):
        given = (logits, head.targets, *slopes, 0.7, "auto")
        check(registered.token_logprobs_gradient.default, given)
        given = (hidden, weight, head.targets, bias, *slopes, 0.7, "auto", True, False, True)
        check(registered.linear_logprobs_gradient.default, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spec", ["kl and bonus", "divisors"])
def test_registered_losses_keep_their_word(dtype: torch.dtype, spec: str) -> None:
    options, names = SPECS[spec]
    head, wide = make_head(ROWS, 16, VOCAB, dtype, bias=True), working_dtype(dtype)
    given = batch_of(ROWS, names)
    optional = ("old_logprobs", "ref_logprobs", "sampling_logprobs", "importance_weights", "mask")
    inputs = (given["advantages"], given["cu_seqlens"], *(given.get(name) for name in optional))
    generator = torch.Generator().manual_seed(0)
    logprobs, entropy = torch.rand(2, ROWS, dtype=wide, generator=generator).unbind()
    leaves = (-logprobs).requires_grad_(), entropy.clone().requires_grad_()
    check, registered = torch.library.opcheck, torch.ops.polymath_fast
    check(registered.policy_loss.default, (*leaves, *inputs, *crossing(options)))
    hidden, weight, bias = head.leaves()
    whole = (hidden, weight, head.targets, bias, *inputs, None, *crossing(options), 0.0, "auto")
    check(registered.linear_grpo_loss.default, (*whole, True, True, True))
    hidden, weight, bias = head.leaves()
    hidden, bias = hidden.detach(), bias.detach()
    whole = (hidden, weight, head.targets, bias, *inputs, None, *crossing(options), -1.0, "auto")
    check(registered.linear_grpo_loss.default, (*whole, False, True, False))


@pytest.mark.parametrize("spec", [options for options, _ in SPECS.values()], ids=list(SPECS))
def test_a_spec_survives_its_packing(spec: PolicyLossSpec) -> None:
    assert PolicyLossSpec.unpacked(spec.packed, spec.normalizer, spec.entropy_normalizer) == spec


def test_numbers_of_numpy_survive_too() -> None:
    spec = PolicyLossSpec(epsilon=np.float32(0.1), beta=np.float64(1 / 3))
    assert PolicyLossSpec.unpacked(spec.packed, None, None) == spec
