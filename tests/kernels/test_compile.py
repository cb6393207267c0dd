"""torch.compile of code that calls the operators: it works, and gives what plain calls give."""

from __future__ import annotations

import pytest
import torch
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
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_gives_the_same(op: str, backend: str) -> None:
    torch.compiler.reset()
    head = make_head(ROWS, 16, VOCAB, torch.float32)
    rewards = torch.tensor([1.0, 0.0])
    results = []
    for function in (step, torch.compile(step, backend=backend)):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_registered_operators_keep_their_word(dtype: torch.dtype) -> None:
    head = make_head(ROWS, 16, VOCAB, dtype, bias=True)
    logits = head.hidden @ head.weight.T
    tests = ("test_schema", "test_faketensor")
    registered = torch.ops.polymath_fast
    given = (logits, head.targets, 0.7, "auto")
    torch.library.opcheck(registered.token_logprobs.default, given, test_utils=tests)
    given = (head.hidden, head.weight, head.targets, head.bias, 0.7, "auto")
    torch.library.opcheck(registered.linear_logprobs.default, given, test_utils=tests)
