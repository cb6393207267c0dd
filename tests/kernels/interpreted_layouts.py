"""Inputs in memory of any layout, in Triton's interpreter: they give what contiguous copies give.

`test_triton_interpreter.py` runs this file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import pytest
import torch
from interpreter import interpret
from torch import Tensor
from torch.testing import assert_close
from triton_cases import BF16, FP32, head_loss, rows_loss, upstream
from triton_checks import make_head, make_logits

from polymath_fast.kernels.linear_logprobs._triton import linear_logprobs
from polymath_fast.kernels.prefix_attention import _triton as attention
from polymath_fast.kernels.prefix_attention.blocks import Block
from polymath_fast.kernels.token_logprobs._triton import token_logprobs
from polymath_fast.kernels.triton import head, rows

interpret()


def far_apart(tensor: Tensor) -> Tensor:
    """The same rows, the last one more than 2 ** 31 elements behind the first.

    Their distance fits in an int32, and so does a row's number; the product does not. What
    nobody touches takes no memory, and no room in the file.
    """
    rows, columns = tensor.shape
    step = 2**31 // (rows - 1) + 1
    with tempfile.NamedTemporaryFile() as file:
        memory = torch.from_file(
            file.name, shared=True, size=(rows - 1) * step + columns, dtype=tensor.dtype
        )
    return memory.as_strided(tensor.shape, (step, 1)).copy_(tensor)


LAYOUTS = {
    "rows apart": lambda x: torch.cat([x, x.flip(0)], 1)[:, : x.shape[1]],
    "an odd step apart": lambda x: torch.cat([x, x.flip(0)[:, :1]], 1)[:, :-1],
    "every other": lambda x: torch.stack([x, x.flip(0)], -1).flatten(1)[:, ::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "odd address": lambda x: torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape),
    "same row": lambda x: x[:1].expand(x.shape),
    "far apart": far_apart,
}


def require_same(run: Callable[..., list[Tensor]], given: dict[str, Tensor]) -> None:
    """run(**given), and with copies of what is given, bit by bit."""
    copies = {name: x.clone(memory_format=torch.contiguous_format) for name, x in given.items()}
    found, truth = run(**given), run(**copies)
    assert len(found) == len(truth)
    for mine, true in zip(found, truth, strict=True):
        assert mine.isfinite().all() and torch.equal(mine, true)


def with_gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor], *weights) -> list[Tensor]:
    gradients = torch.autograd.grad(outputs, leaves, weights or None)
    return [*(out.detach() for out in outputs), *gradients]


@pytest.mark.parametrize("layout", ["an odd step apart", "far apart"])
def test_logits(layout: str) -> None:
    """In layouts that `interpreted_rows.py` has not."""
    tensors = make_logits(6, 1000, BF16, "cpu")

    def run(logits: Tensor, targets: Tensor) -> list[Tensor]:
        leaf = logits.requires_grad_()
        plain = with_gradients(token_logprobs(leaf, targets, 0.7), [leaf], *upstream(6))
        return plain + with_gradients((rows_loss(leaf, targets).loss,), [leaf])

    require_same(run, tensors | {"logits": LAYOUTS[layout](tensors["logits"])})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, BF16) for name in LAYOUTS), ("odd address", FP32), ("far apart", FP32)],
    ids=str,
)
def test_heads(name: str, dtype: torch.dtype, monkeypatch) -> None:
    """The hidden states in one layout, the weight in the next, 8 rows in a chunk of the loss."""
    tensors = make_head(13, 300, 48, dtype, "cpu")
    following = (list(LAYOUTS) * 2)[list(LAYOUTS).index(name) + 1]
    tensors["hidden"] = LAYOUTS[name](tensors["hidden"])
    tensors["weight"] = LAYOUTS[following](tensors["weight"])

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in (hidden, weight)]
        found = linear_logprobs(*leaves, targets, None, 0.7)
        plain = with_gradients(found, leaves, *upstream(13))
        with monkeypatch.context() as patch:
            patch.setattr(head.Head, "_rows_that_fit", lambda self: 8)
            out = head_loss(*leaves, targets)
        return plain + [out.logprobs] + with_gradients((out.loss,), leaves)

    del tensors["bias"]
    require_same(run, tensors)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_logits_that_begin_anywhere_take_two_sweeps(entropy_coef: float, monkeypatch) -> None:
    """What they do on a GPU, where the fused kernel has no registers for them."""
    tensors = make_logits(6, 700, FP32, "cpu")
    tensors["logits"][2, 3] = torch.inf
    tensors["logits"][4, tensors["targets"][4]] = -torch.inf
    found = []
    for fused in (True, False):
        monkeypatch.setattr(rows, "fuses", lambda *matrices, fused=fused: fused)
        leaf = tensors["logits"].clone().requires_grad_()
        out = rows_loss(leaf, tensors["targets"], entropy_coef=entropy_coef)
        out.loss.backward()
        found.append((out.logprobs, out.entropy, leaf.grad))
    assert found[0][2].isfinite().all() and found[0][2].any()
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["odd address", "an odd step apart", "rows apart"])
def test_attention(layout: str, monkeypatch) -> None:
    """Kernels get nothing whose vectors begin anywhere."""
    seen, launched = [], attention.attention_kernel

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *given, **options: (
                seen.extend(given[:3]),
                launched[grid](*given, **options),
            )

    monkeypatch.setattr(attention, "attention_kernel", Kernel())
    x = torch.randn(3, 20, 2 * 16, generator=torch.Generator().manual_seed(3)).to(BF16)

    def run(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        leaves = [each.requires_grad_() for each in (q, k, v)]
        heads = [each.unflatten(1, (2, 16)) for each in leaves]
        out = attention.prefix_attention(*heads, (Block(6, (0, 6, 14)),), 0.25)
        return with_gradients((out,), leaves, torch.ones_like(out))

    require_same(run, dict(zip("qkv", map(LAYOUTS[layout], x), strict=True)))
    assert len(seen) == 6
    for each in seen:
        assert each.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in each.stride()[:2])
