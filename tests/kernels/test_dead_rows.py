"""Rows of an LM head on a CPU that carry no gradient enter none of the backward products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from heads import Head, make_head, plain_logprobs

from polymath_fast.kernels import PolicyLossSpec, linear_grpo_loss, linear_logprobs
from polymath_fast.kernels.cpu import head as head_module
from polymath_fast.kernels.cpu import head_gradient, products

ROWS = 60  # four completions of 15 tokens
ADVANTAGES = torch.tensor([1.0, 0.0, -1.0, 0.0])
ON_POLICY = [0, 3, 6, 9, 12, 30, 33, 36, 39, 42]
"""trained tokens, every third, of the two completions with an advantage"""


@pytest.fixture(params=["tiles", "torch"], autouse=True)
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of multiplying bf16 matrices, whatever this processor would choose."""
    monkeypatch.setattr(products.tiles, "available", lambda dtype: request.param == "tiles")


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Product -> rows of each call of it."""
    seen: dict[str, list[int]] = {"logits": [], "d_hidden": [], "d_weight": []}

    def watch(owner: type, method: str, name: str, count: Callable[..., int]) -> None:
        real = getattr(owner, method)

        def counted(self, *given):
            seen[name].append(count(*given))
            return real(self, *given)

        monkeypatch.setattr(owner, method, counted)

    def of_d_weight(slopes, hidden, out, add) -> int:
        assert len(slopes) == len(hidden)
        return len(slopes)

    watch(products.TileProducts, "logits_and_sums", "logits", lambda hidden, *rest: len(hidden))
    watch(products.TorchProducts, "logits", "logits", lambda hidden, out: len(hidden))
    for owner in (products.TileProducts, products.TorchProducts):
        watch(owner, "d_hidden", "d_hidden", lambda slopes, count, *rest: count)
        watch(owner, "d_weight", "d_weight", of_d_weight)
    return seen


@pytest.fixture
def head() -> Head:
    return make_head(ROWS, 32, 300)


def hidden_gradient(head: Head, spec: PolicyLossSpec, **inputs) -> tuple[torch.Tensor, dict]:
    """With the loss's metrics."""
    hidden, weight, _ = head.leaves()
    count = len(hidden)
    offsets = torch.arange(0, count + 1, count // 4, dtype=torch.int32)
    given = (head.targets, ADVANTAGES, offsets)
    mask = torch.arange(count) % 3 == 0
    out = linear_grpo_loss(hidden, weight, *given, mask=mask, spec=spec, **inputs)
    out.loss.backward()
    return hidden.grad, out.metrics


def rows_with_gradient(gradient: torch.Tensor) -> list[int]:
    return (gradient != 0).any(1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("vocab_tol", [0.0, 0.01], ids=["all columns", "some columns"])
def test_tokens_whose_coefficient_is_zero(head, multiplied, vocab_tol) -> None:
    old, _ = plain_logprobs(*head.leaves(torch.float64), head.targets)
    old = old.detach().float()
    old[0] -= 2  # a good token whose ratio is above its bound
    old[33] += 2  # a bad one whose ratio is below it
    gradient, metrics = hidden_gradient(
        head, PolicyLossSpec(), old_logprobs=old, vocab_tol=vocab_tol
    )
    live = sorted({*ON_POLICY} - {0, 33})
    assert multiplied == {"logits": [ROWS], "d_hidden": [len(live)], "d_weight": [len(live)]}
    assert rows_with_gradient(gradient) == live
    assert metrics.get("vocab/live_share", 1) < 1 or not vocab_tol


def test_coefficients_that_wait_for_their_whole_completion(head, multiplied) -> None:
    """The logits, too, are computed anew of those rows alone."""
    gradient, _ = hidden_gradient(head, PolicyLossSpec(loss_type="gspo"))
    live = len(ON_POLICY)
    assert multiplied == {"logits": [ROWS, live], "d_hidden": [live], "d_weight": [live]}
    assert rows_with_gradient(gradient) == ON_POLICY


def test_rows_are_collected_over_blocks_without_gaps(multiplied, monkeypatch) -> None:
    """An entropy bonus gives every trained token a gradient: in blocks of 32 rows 11, 11, 10 and so
    on, of which three fill the buffer."""
    monkeypatch.setattr(head_module, "LOGITS_BYTES", 1)
    monkeypatch.setattr(head_gradient, "SLOPES_BYTES", 1)
    gradient, _ = hidden_gradient(make_head(200, 32, 300), PolicyLossSpec(entropy_coef=0.1))
    assert multiplied["logits"] == [32, 32, 32, 32, 32, 32, 8]
    assert multiplied["d_hidden"] == multiplied["d_weight"] == [32, 32, 3]
    assert rows_with_gradient(gradient) == [*range(0, 200, 3)]


def test_gradients_of_logprobs_and_entropies(multiplied) -> None:
    head = make_head(ROWS, 32, 300, spread=3.0)  # no target is as unlikely as 1e-9
    hidden, weight, _ = head.leaves()
    logprobs, entropy = linear_logprobs(hidden, weight, head.targets)
    (logprobs[7:9].sum() + entropy[8:11].sum()).backward()
    assert multiplied == {"logits": [ROWS, 4], "d_hidden": [4], "d_weight": [4]}
    assert rows_with_gradient(hidden.grad) == [7, 8, 9, 10]
