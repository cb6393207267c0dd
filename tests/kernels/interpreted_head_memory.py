"""Memory that an LM head takes, its own and lent, in Triton's interpreter.

`test_triton_interpreter.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import interpret
from triton_cases import BF16, FP16, FP32, prepared_batch
from triton_checks import loss_result, make_batch, make_head

from polymath_fast.kernels import scratch
from polymath_fast.kernels.linear_grpo_loss._triton import linear_grpo_loss
from polymath_fast.kernels.linear_logprobs._triton import linear_logprobs
from polymath_fast.kernels.policy_loss import PolicyLossSpec, prepare
from polymath_fast.kernels.triton import budget, head, vocabulary

interpret()

LENT = [
    pytest.param(BF16, PolicyLossSpec(), 0.0, 1 << 22, id="all-of-it"),
    pytest.param(BF16, PolicyLossSpec(loss_type="gspo"), 0.0, 1 << 16, id="too-little"),
    pytest.param(FP16, PolicyLossSpec(entropy_coef=0.01), 1e-3, 1 << 22, id="chosen-columns"),
    pytest.param(FP32, PolicyLossSpec(), 0.0, 1 << 22, id="single"),
]


@pytest.mark.parametrize(("dtype", "spec", "tol", "size"), LENT)
def test_head_loss_has_the_same_bits_in_lent_memory(dtype, spec, tol, size, monkeypatch) -> None:
    """Of a KV cache full of NaN; only results outlive the loan, which leaves zeros."""
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 16)
    tensors, batch = make_head(37, 1000, 48, dtype, "cpu", bias=True), make_batch(37, "cpu")
    given = ("linear_grpo_loss", "_triton", tensors, batch, spec, tol)
    plain = loss_result(*given)
    owner = torch.full((size,), 255, dtype=torch.uint8)
    asked, take = [], scratch.Arena.take

    def note(arena, count, dtype):
        asked.append(take(arena, count, dtype))
        return asked[-1]

    monkeypatch.setattr(scratch.Arena, "take", note)
    with scratch.lend(scratch.Arena([owner.untyped_storage()])) as arena:
        lent = loss_result(*given)
        with torch.no_grad():
            loss_result_without_gradient(tensors, batch, spec)
        assert arena.in_use == 0  # every call has given back what it took
    chunk = 16 * 1000 * dtype.itemsize
    assert arena.most >= chunk if size > 1 << 16 else arena.refused >= 4 * 1000 * 48
    addresses = [part.data_ptr() - owner.data_ptr() for part in asked if part is not None]
    assert addresses and all(0 <= address < size for address in addresses)
    for name, value in plain.gradients.items():
        assert torch.equal(lent.gradients[name], value)
    assert torch.equal(lent.logprobs, plain.logprobs)
    assert torch.equal(lent.entropy, plain.entropy)
    assert lent.output.loss == plain.output.loss


def loss_result_without_gradient(tensors, given, spec) -> None:
    """Both operators that read the head under no_grad, as for old log-probs."""
    hidden, weight, targets, bias = (tensors[n] for n in ("hidden", "weight", "targets", "bias"))
    linear_logprobs(hidden, weight, targets, bias, 1.0)
    prepared = prepare(
        spec, 37, torch.float32, hidden.device, given["advantages"], given["cu_seqlens"]
    )
    linear_grpo_loss(hidden, weight, targets, bias, prepared, spec, 0.0)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("tol", [0.0, 0.3], ids=["all-columns", "some-columns"])
def test_scratch_is_what_the_budget_says(dtype, tol, monkeypatch) -> None:
    """Of several chunks; `memory.estimate` counts by the same functions."""
    monkeypatch.setattr(budget, "SMALLEST_BUDGET", 130 * budget.CELLS[dtype] * 1024)
    count, vocab, depth, held = 130, 1000, 16, []

    def noting(owner: type) -> None:
        release = owner.release

        def note(self) -> None:
            held.append(sum(buffer.nbytes for buffer in self._scratch._buffers.values()))
            release(self)

        monkeypatch.setattr(owner, "release", note)

    noting(head.Head)
    noting(vocabulary.Vocabulary)
    tensors = make_head(count, vocab, depth, dtype, "cpu")
    leaves = [tensors[n].detach().requires_grad_() for n in ("hidden", "weight")]
    spec = PolicyLossSpec()
    linear_grpo_loss(*leaves, tensors["targets"], None, prepared_batch(count, spec), spec, tol)
    gpu = budget.gpu_of(torch.device("cpu"))
    assert budget.chunk_rows(count, vocab, depth, dtype, gpu) == 128
    counted = budget.head_bytes(count, vocab, depth, dtype, gpu, some_columns=tol > 0)
    counted -= (dtype.itemsize * count + 4 * vocab) * depth  # both gradients
    counted -= 128 * 2 * dtype.itemsize * depth  # rows of hidden states, gathered and scaled
    assert 0.95 * counted < sum(held) <= counted
