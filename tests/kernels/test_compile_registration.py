"""Operators as torch.compile sees them: registered, in breaks of the graph, with packed specs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compiled_runs import OPERATORS, ROWS, SPECS, VOCAB, batch_of, run
from heads import make_head
from torch import Tensor
from torch.testing import assert_close

from polymath_fast.kernels import (
    PolicyLossSpec,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    policy_loss,
    token_logprobs,
)
from polymath_fast.kernels.checks import working_dtype
from polymath_fast.kernels.policy_loss.compiled import crossing


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
