"""prefix_attention against its specification in float64: outputs and all gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from polymath_fast.kernels import prefix_attention
from polymath_fast.kernels.prefix_attention import _cpu as cpu

# relative error of the output and of dq, dk, dv against float64
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def inputs(lengths, prompt_len, heads=(6, 2), head_dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = prompt_len + sum(lengths)
    shapes = [(rows, heads[0], head_dim), *[(rows, heads[1], head_dim)] * 2]
    q, k, v = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return q, k, v, cu_seqlens


def run(impl, dtype, q, k, v, prompt_len, cu_seqlens, grad):
    leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
    out = prefix_attention(*leaves, prompt_len, cu_seqlens, impl=impl)
    out.backward(grad.to(dtype))
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("lengths", "prompt_len"),
    [
        ([5, 1, 0, 17], 7),  # ragged, one token, an empty completion
        ([3], 1),  # a prompt of one token
        ([], 9),  # no completion at all
        ([0, 0], 4),  # only empty ones
        ([33] * 6, 65),  # more rows than one block of the kernel
    ],
)
def test_agrees_with_float64(lengths, prompt_len, dtype):
    q, k, v, cu_seqlens = inputs(lengths, prompt_len, dtype=dtype)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    found = run("cpu", dtype, q, k, v, prompt_len, cu_seqlens, grad)
    truth = run("reference", torch.float64, q, k, v, prompt_len, cu_seqlens, grad)
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, truth, strict=True):
        error = (x.double() - y).norm() / y.norm()
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


def test_reference_is_ordinary_attention():
    """Each completion alone: the textbook causal attention over [prompt | completion]."""
    q, k, v, cu_seqlens = inputs([4, 6], 5, heads=(2, 2), dtype=torch.float64)
    out = prefix_attention(q, k, v, 5, cu_seqlens, impl="reference")
    for start, end in ((5, 9), (9, 15)):
        rows = torch.tensor([*range(5), *range(start, end)])
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[rows].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True
        )[0].transpose(0, 1)
        torch.testing.assert_close(out[rows], alone)


@pytest.mark.parametrize("impl", ["cpu", "reference", "padded"])
@pytest.mark.parametrize(("lengths", "prompt_len"), [([5, 1, 0, 17], 7), ([3], 1)])
def test_queries_of_the_completions_alone(lengths, prompt_len, impl, monkeypatch):
    """The prompt's keys and values are given, its own output is known: the other rows are equal."""
    if impl == "padded":  # what an implementation does that wants every row
        monkeypatch.delattr(cpu, "QUERIES_OF_COMPLETIONS")
    q, k, v, cu_seqlens = inputs(lengths, prompt_len)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    grad[:prompt_len] = 0
    truth = run("reference", torch.float64, q, k, v, prompt_len, cu_seqlens, grad)
    name = "reference" if impl == "reference" else "cpu"
    tail = slice(prompt_len, None)
    found = run(name, torch.float32, q[tail], k, v, prompt_len, cu_seqlens, grad[tail])
    truth = [truth[0][tail], truth[1][tail], *truth[2:]]
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, truth, strict=True):
        assert x.shape == y.shape
        assert (x.double() - y).norm() <= 1e-6 * y.norm(), name


def test_completions_do_not_see_each_other():
    q, k, v, cu_seqlens = inputs([4, 6], 5)
    before = prefix_attention(q, k, v, 5, cu_seqlens)
    v2, k2 = v.clone(), k.clone()
    v2[5:9] += 3
    k2[5:9] += 3
    after = prefix_attention(q, k2, v2, 5, cu_seqlens)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[5:9], after[5:9])


def test_two_runs_are_equal_to_the_bit():
    q, k, v, cu_seqlens = inputs([40, 3, 25], 30, dtype=torch.bfloat16)
    grad = torch.randn(q.shape)
    first = run("cpu", torch.bfloat16, q, k, v, 30, cu_seqlens, grad)
    second = run("cpu", torch.bfloat16, q, k, v, 30, cu_seqlens, grad)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_strided_inputs():
    """q, k, v as transformers passes them: views of (1, heads, rows, head_dim)."""
    q, k, v, cu_seqlens = inputs([4, 6], 5)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert not views[0].is_contiguous()
    torch.testing.assert_close(
        prefix_attention(*views, 5, cu_seqlens), prefix_attention(q, k, v, 5, cu_seqlens)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"prompt_len": 4}, "prompt_len 4"),
        (lambda a: a | {"prompt_len": 0}, "prompt_len 0"),
        (lambda a: a | {"cu_seqlens": torch.tensor([0, 7, 4])}, "never fall"),
        (lambda a: a | {"cu_seqlens": torch.tensor([1, 10])}, "start at 0"),
        (lambda a: a | {"k": a["k"].bfloat16()}, "differ"),
        (lambda a: a | {"k": a["k"][:, :, :8]}, "want .T, Hq, D."),
        (lambda a: a | {"k": a["k"][1:], "v": a["v"][1:]}, "14 rows of k and 15 of q"),
        (lambda a: a | {"q": a["q"][3:]}, "15 rows of k and 12 of q"),
        (lambda a: a | {"q": a["q"][:, :5]}, "5 query heads"),
        (lambda a: a | {"impl": "triton"}, "prefix_attention has only"),
    ],
)
def test_bad_input_is_named(change, message):
    q, k, v, cu_seqlens = inputs([4, 6], 5)
    arguments = change({"q": q, "k": k, "v": v, "prompt_len": 5, "cu_seqlens": cu_seqlens})
    with pytest.raises(ValueError, match=message):
        prefix_attention(**arguments)
