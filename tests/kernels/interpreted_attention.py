"""Attention over shared prompts in Triton's interpreter; `test_triton_interpreter.py` runs this.

Tiles of 16 and 32 rows, so that small shapes have whole tiles, tails and more than one of each.
"""

from __future__ import annotations

import pytest
import torch
from attention_checks import LAYOUTS, TREES, compare, make, run
from closeness import relative_error
from interpreter import interpret

from polymath_fast.kernels import dispatch
from polymath_fast.kernels.prefix_attention import _triton
from polymath_fast.kernels.prefix_attention.blocks import Block
from polymath_fast.kernels.triton import attention_schedule
from polymath_fast.learner.packing import TrainingRow, pack
from polymath_fast.learner.policy import Policy

interpret()

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TRUNCATION = 2.0**-7
"""relative error of bf16 in the interpreter, which cuts digits off where a GPU rounds"""
attend = _triton.prefix_attention


@pytest.fixture
def pieces(monkeypatch):
    """The gradients of a prompt's keys come in pieces."""
    _triton._tables.cache_clear()
    monkeypatch.setattr(attention_schedule, "SHORTEST", 16)
    yield
    _triton._tables.cache_clear()


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - {"every length", "one token each"}))
def test_agrees_with_float64(name) -> None:
    compare(attend, LAYOUTS[name], heads=(2, 1))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("name", sorted(set(TREES) - {"many short ones"}))
def test_a_tree_agrees_with_float64(name) -> None:
    compare(attend, TREES[name], heads=(2, 1))


@pytest.mark.usefixtures("pieces")
def test_a_tree_without_its_prompts() -> None:
    compare(attend, TREES["trees beside each other"], heads=(2, 1), alone=True)


@pytest.mark.usefixtures("pieces")
def test_many_short_completions() -> None:
    compare(attend, [(18, [1] * 20 + [2, 3])], heads=(1, 1))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("name", ["only empty completions", "several prompts"])
def test_queries_of_the_completions_alone(name) -> None:
    compare(attend, LAYOUTS[name], heads=(2, 1), alone=True)


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim"),
    [
        pytest.param(FP32, (4, 2), 20, id="odd-width"),
        pytest.param(FP32, (2, 2), 5, id="narrow"),
        pytest.param(BF16, (4, 2), 32, id="bf16"),
        pytest.param(FP16, (4, 1), 16, id="fp16"),
    ],
)
def test_widths_heads_and_dtypes(dtype, heads, head_dim) -> None:
    layout = [(19, [24, 1]), (2, [3])]
    rounding = TRUNCATION if dtype == BF16 else None
    compare(attend, layout, heads=heads, head_dim=head_dim, dtype=dtype, rounding=rounding)


@pytest.mark.usefixtures("pieces")
def test_two_runs_are_bit_equal() -> None:
    layout = [(17, [20])]
    tensors = make(layout, (2, 1), 16, BF16)
    first, second = (run(attend, tensors, layout, 0.3) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_strided_inputs() -> None:
    layout = [(5, [14, 6])]
    tensors = make(layout, (2, 1), 16, FP32)
    plain = run(attend, tensors, layout, 0.3)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    scattered = [x.repeat_interleave(2, dim=2)[..., ::2] for x in tensors]
    for views in (heads_first, scattered):
        assert not views[0].is_contiguous()
        blocks = (Block(5, (0, 14, 20)),)
        leaves = [x.detach().requires_grad_() for x in views[:3]]
        out = attend(*leaves, blocks, 0.3)
        out.backward(views[3])
        found = [out.detach(), *(x.grad for x in leaves)]
        assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))


def test_only_the_gradients_that_are_wanted() -> None:
    layout, blocks = [(5, [14])], (Block(5, (0, 14)),)
    q, k, v, grad = make(layout, (2, 1), 16, FP32)
    every = run(attend, [q, k, v, grad], layout, 0.3)
    q.requires_grad_()
    attend(q, k, v, blocks, 0.3).backward(grad)
    assert torch.equal(q.grad, every[1]) and k.grad is None
    v.requires_grad_()
    attend(q.detach(), k, v, blocks, 0.3).backward(grad)
    assert torch.equal(v.grad, every[3]) and k.grad is None


def test_large_scores_do_not_overflow() -> None:
    layout = [(18, [20])]
    tensors = make(layout, (2, 1), 16, FP32)
    tensors[0] *= 300
    compare_with = run(attend, tensors, layout, 1.0)
    assert all(x.isfinite().all() for x in compare_with)


def test_a_model_that_attends_with_it(tiny_model, monkeypatch) -> None:
    """Strides and layouts as transformers passes them: the learner's states and gradients."""
    rows = [
        TrainingRow(
            prompt_ids=prompt, token_ids=ids, sampling_logprobs=[0.0] * len(ids), advantage=1
        )
        for prompt in ((5, 9, 17, 33, 70), (8, 21))
        for ids in ([40, 41, 42, 43, 44, 45], [50], [60, 61, 62])
    ]
    policy = Policy(tiny_model, dtype=FP32)
    found = []
    plain = dispatch.resolve

    def here(op: str, *given: object) -> object:
        return _triton if op == "prefix_attention" else plain(op, *given)

    for resolve in (plain, here):
        monkeypatch.setattr(dispatch, "resolve", resolve)
        states = policy.hidden(pack(rows))
        policy.model.zero_grad()
        states.square().sum().backward()
        weights = policy.model.named_parameters()
        found.append([states.detach(), *(w.grad for _, w in weights if w.grad is not None)])
    for cpu, ours in zip(*found, strict=True):
        assert relative_error(ours, cpu) < 1e-5


def test_tables_are_made_once_for_all_layers() -> None:
    layout = [(5, [14, 6])]
    tensors = make(layout, (2, 1), 16, FP32)
    _triton._tables.cache_clear()
    for _ in range(3):
        run(attend, tensors, layout, 0.3)
    assert _triton._tables.cache_info().misses == 1
