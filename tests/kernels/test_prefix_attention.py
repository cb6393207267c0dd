"""prefix_attention against its specification in float64: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from attention_checks import LAYOUTS, TREES, compare, eager, make, offsets_of, run, visible
from closeness import relative_error

from polymath_fast.kernels import prefix_attention, prefix_attention_blocks
from polymath_fast.kernels.prefix_attention import _cpu, reference

EVERY = LAYOUTS | TREES
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(lengths, prompt_len, heads=(6, 2), dtype=torch.float32):
    layout = [(prompt_len, lengths)]
    return *make(layout, heads, 16, dtype)[:3], offsets_of(layout)[0][1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", EVERY.values(), ids=EVERY)
def test_agrees_with_float64(layout, dtype):
    compare(_cpu.prefix_attention, layout, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("implementation", [_cpu, reference])
def test_queries_of_the_completions_alone(implementation, layout, dtype):
    """The prompt's keys and values are given, its own output is known: the other rows are equal."""
    compare(implementation.prefix_attention, layout, dtype=dtype, alone=True)


def test_a_thousand_identical_completions():
    layout = [(6, [5] * 1024)]
    tensors = make(layout, (2, 1), 16, torch.float32)
    for x in tensors:
        x[6:] = x[6:11].repeat(1024, 1, 1)
    out, d_q, d_k, d_v = run(_cpu.prefix_attention, tensors, layout, 0.25)
    # in float64: what one completion adds is multiplied by 1,024 below, and so is its error
    once = run(eager, [x[:11].double() for x in tensors], [(6, [5])], 0.25)
    for mine, other in zip((out, d_q, d_k, d_v), once, strict=True):
        torch.testing.assert_close(mine[6:].view(1024, 5, *mine.shape[1:]).unique(dim=0)[0],
                                   other[6:].float(), rtol=1e-5, atol=1e-6)  # fmt: skip
    alone = run(eager, [x[:6].double() for x in tensors], [(6, [])], 0.25)
    for mine, other, prompt in zip((d_k, d_v), once[2:], alone[2:], strict=True):
        total = prompt[:6] + 1024 * (other[:6] - prompt[:6])
        # equal terms round the same way, so float32 drifts by more than chance would let it
        assert relative_error(mine[:6], total) < 1e-4


def test_derivatives_by_finite_differences():
    """The specification in float64 is the derivative of itself: gradcheck of autograd's way."""
    q, k, v, cu_seqlens = inputs([2, 0, 3], 2, heads=(2, 1), dtype=torch.float64)
    leaves = [x[..., :3].clone().requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(
        lambda *x: prefix_attention(*x, 2, cu_seqlens, impl="reference"), leaves
    )


def test_blocks_are_calls_side_by_side():
    layout = LAYOUTS["several prompts"]
    q, k, v, _ = make(layout, (4, 2), 16, torch.float32)
    together = prefix_attention_blocks(q, k, v, offsets_of(layout))
    start = 0
    for prompt_len, cu_seqlens in offsets_of(layout):
        end = start + prompt_len + int(cu_seqlens[-1])
        alone = prefix_attention(q[start:end], k[start:end], v[start:end], prompt_len, cu_seqlens)
        torch.testing.assert_close(together[start:end], alone)
        start = end


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


@pytest.mark.parametrize("layout", TREES.values(), ids=TREES)
def test_a_tree_is_ordinary_attention_with_a_mask(layout):
    q, k, v, grad = (x.double() for x in make(layout, (2, 2), 8, torch.float64))
    mask = visible(layout)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = prefix_attention_blocks(*leaves, offsets_of(layout), impl="reference")
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in leaves), attn_mask=mask
    )[0].transpose(0, 1)
    for ours, truth in zip(found, [out, *torch.autograd.grad(out, leaves, grad)], strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_tree_says_what_repeated_beginnings_say(impl):
    """[prompt | a b c], [prompt | a b d e], [prompt | f]: rows that are shared, and rows that are
    computed for each, get the same outputs, and shared keys the sum of the gradients."""
    q, k, v, grad = make([(3, [2, 1, 2, 1])], (4, 2), 16, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    offsets = torch.tensor([0, 2, 3, 5, 6], dtype=torch.int32)
    tree = prefix_attention(*leaves, 3, offsets, parents=[-1, 0, 0, -1], impl=impl)
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 3, 4, 6, 7, 8])
    bounds = torch.tensor([0, 3, 7, 8], dtype=torch.int32)
    apart = prefix_attention(*(x[rows] for x in leaves), 3, bounds, impl=impl)
    torch.testing.assert_close(apart, tree[rows])
    weights = grad[rows].clone()
    weights[6:8] = 0  # the same rows again
    found = torch.autograd.grad(tree, leaves, grad)
    for ours, truth in zip(found, torch.autograd.grad(apart, leaves, weights), strict=True):
        torch.testing.assert_close(ours, truth)


def test_a_flat_tree_is_no_tree():
    q, k, v, cu_seqlens = inputs([4, 6], 5)
    plain = prefix_attention(q, k, v, 5, cu_seqlens)
    flat = prefix_attention(q, k, v, 5, cu_seqlens, parents=[-1, -1])
    assert torch.equal(plain, flat)


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
    layout = [(30, [40, 3, 25])]
    tensors = make(layout, (6, 2), 16, torch.bfloat16)
    first, second = (run(_cpu.prefix_attention, tensors, layout, 0.3) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_strided_inputs():
    """q, k, v as transformers passes them: views of (1, heads, rows, head_dim)."""
    q, k, v, cu_seqlens = inputs([4, 6], 5)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert not views[0].is_contiguous()
    torch.testing.assert_close(
        prefix_attention(*views, 5, cu_seqlens), prefix_attention(q, k, v, 5, cu_seqlens)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", ["q", "k", "v"])
def test_heads_whose_numbers_lie_apart(turned, dtype):
    """A view whose last dimension is not the innermost one in memory."""
    layout = [(5, [4, 6])]
    tensors = make(layout, (4, 2), 16, dtype)
    plain = run(_cpu.prefix_attention, tensors, layout, 0.3)
    place = "qkv".index(turned)
    tensors[place] = tensors[place].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert tensors[place].stride(-1) > 1
    found = run(_cpu.prefix_attention, tensors, layout, 0.3)
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"prompt_len": 4}, "prompt_len 4"),
        (lambda a: a | {"prompt_len": 0}, "prompt_len 0"),
        (lambda a: a | {"cu_seqlens": torch.tensor([0, 7, 4])}, "never fall"),
        (lambda a: a | {"cu_seqlens": torch.tensor([1, 10])}, "start at 0"),
        (lambda a: a | {"cu_seqlens": [0, 4, 10]}, "cu_seqlens must be a tensor, got list"),
        (lambda a: a | {"cu_seqlens": torch.tensor([0.0, 4.0, 10.0])}, "cu_seqlens must be int32"),
        (lambda a: a | {"cu_seqlens": torch.tensor([[0, 4], [0, 10]])}, "cu_seqlens must be int32"),
        (lambda a: a | {"q": a["q"].tolist()}, "q must be a tensor, got list"),
        (lambda a: a | {"k": a["k"].bfloat16()}, "differ"),
        (lambda a: a | {"k": a["k"][:, :, :8]}, "want .T, Hq, D."),
        (lambda a: a | {"k": a["k"][1:], "v": a["v"][1:]}, "14 rows of k and 15 of q"),
        (lambda a: a | {"q": a["q"][3:]}, "15 rows of k and 12 of q"),
        (lambda a: a | {"q": a["q"][:, :5]}, "5 query heads"),
        (lambda a: a | {"impl": "triton"}, "the tensors are on cpu"),
        (lambda a: a | {"impl": "flash"}, "the tensors are on cpu"),
        (lambda a: a | {"impl": "cuda"}, "prefix_attention has only"),
        (lambda a: a | {"scale": -1.0}, "scale -1.0"),
        (lambda a: a | {"parents": [-1]}, "1 parents for 2 segments"),
        (lambda a: a | {"parents": [-1, 1]}, "segment 1 has parent 1"),
        (lambda a: a | {"parents": [-2, 0]}, "segment 0 has parent -2"),
        (
            lambda a: a | {"parents": [-1, -1, 0], "cu_seqlens": torch.tensor([0, 2, 4, 10])},
            "segment 2 has parent 0; it must be -1",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    q, k, v, cu_seqlens = inputs([4, 6], 5)
    arguments = change({"q": q, "k": k, "v": v, "prompt_len": 5, "cu_seqlens": cu_seqlens})
    with pytest.raises(ValueError, match=message):
        prefix_attention(**arguments)
