"""What every implementation of prefix_attention must fulfil; truth is the reference in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from polymath_fast.kernels.prefix_attention import reference
from polymath_fast.kernels.prefix_attention.blocks import to_blocks

Layout = list[tuple[int, list[int]] | tuple[int, list[int], list[int]]]
"""of each block the prompt's length, those of its segments and, in a tree, their parents"""
Attend = Callable[..., torch.Tensor]
"""(q, k, v, blocks as numbers, scale) -> out"""

LAYOUTS: dict[str, Layout] = {
    "ragged, one token, an empty completion": [(7, [5, 1, 0, 17])],
    "a prompt of one token": [(1, [3])],
    "no completion": [(9, [])],
    "only empty completions": [(4, [0, 0])],
    "more rows than a tile": [(35, [33] * 3)],
    "one token each": [(18, [1] * 40)],
    "every length": [(5, [*range(1, 13)])],
    "several prompts": [(3, [9, 1]), (1, []), (20, [0, 31, 2]), (16, [16, 16])],
}
TREES: dict[str, Layout] = {
    "two with one beginning": [(5, [6, 4, 9], [-1, 0, 0])],
    "a chain": [(3, [4, 3, 2, 5], [-1, 0, 1, 2])],
    "deep and shallow": [(7, [20, 3, 17, 1, 9, 0, 33, 2, 5], [-1, 0, 1, 1, 0, -1, -1, 6, 6])],
    "an inner segment without rows": [(4, [3, 0, 5, 2, 6], [-1, 0, 1, 1, -1])],
    "siblings that fill tiles": [(18, [35, 33, 40, 1, 1, 1, 31], [-1, 0, 0, 0, 0, 0, -1])],
    "many short ones": [(9, [12] + [2] * 25, [-1] + [0] * 25)],
    "trees beside each other": [
        (3, [9, 1, 4], [-1, 0, 0]), (20, [0, 31, 2]), (1, []), (16, [16, 16, 16], [-1, 0, 1]),
    ],
}  # fmt: skip
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-19}
"""relative error allowed on top of what eager PyTorch makes"""
NAMES = ("out", "d_q", "d_k", "d_v")


def offsets_of(layout: Layout) -> list[tuple[int, torch.Tensor]]:
    """(prompt_len, cu_seqlens, parents) of each block."""
    return [
        (prompt, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), *more)
        for prompt, lengths, *more in layout
    ]


def visible(layout: Layout) -> torch.Tensor:
    """(T, T) bool, whether query i may see key j: written out for each pair of rows."""
    places = []  # block, segment (-1: the prompt), segments that it continues
    for block, (prompt, lengths, *more) in enumerate(layout):
        places += [(block, -1, ())] * prompt
        lines = {-1: (-1,)}
        for segment, length in enumerate(lengths):
            lines[segment] = (*lines[more[0][segment] if more else -1], segment)
            places += [(block, segment, lines[segment])] * length
    seen = [
        [
            j <= i and mine[0] == other[0] and (other[1] in mine[2] or other[1] == -1)
            for j, other in enumerate(places)
        ]
        for i, mine in enumerate(places)
    ]
    return torch.tensor(seen)


def make(
    layout: Layout, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str = "cpu"
) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    rows = sum(prompt + sum(lengths) for prompt, lengths, *_ in layout)
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, count, head_dim) for count in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(s, generator=generator).to(dtype).to(device) for s in shapes]


def of_completions(layout: Layout) -> torch.Tensor:
    """(T,) bool, False for the rows of prompts."""
    parts = [[False] * prompt + [True] * sum(lengths) for prompt, lengths, *_ in layout]
    return torch.tensor(sum(parts, []))


def eager(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: tuple, scale: float
) -> torch.Tensor:
    """A row for each completion, as transformers' eager attention computes it in the dtype; for
    segments in a tree one row with a mask."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    outs, start = [], 0
    for prompt, offsets, parents in blocks:
        if parents:
            rows = slice(start, start + prompt + offsets[-1])
            lengths = [high - low for low, high in itertools.pairwise(offsets)]
            hidden = ~visible([(prompt, lengths, list(parents))]).to(q.device)
            scores = torch.einsum("qhd,khd->hqk", q[rows], k[rows]) * scale
            p = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
            outs.append(torch.einsum("hqk,khd->qhd", p, v[rows]))
            start = rows.stop
            continue
        head, middle = list(range(start, start + prompt)), start + prompt
        bounds = [(start, start), *itertools.pairwise(middle + offset for offset in offsets)]
        for low, high in bounds:
            own = head if low == start else list(range(low, high))
            keys = own if low == start else head + own
            scores = torch.einsum("qhd,khd->hqk", q[own], k[keys]) * scale
            hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(len(keys) - len(own) + 1)
            p = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
            outs.append(torch.einsum("hqk,khd->qhd", p, v[keys]))
        start = middle + offsets[-1]
    return torch.cat(outs)


def run(attend: Attend, tensors: list[torch.Tensor], layout: Layout, scale: float) -> list:
    """Output and gradients."""
    *leaves, grad = (x.detach().clone() for x in tensors)
    blocks = to_blocks(offsets_of(layout), len(leaves[0]), len(leaves[1]))
    out = attend(*(x.requires_grad_() for x in leaves), blocks, scale)
    out.backward(grad)
    return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def compare(
    attend: Attend,
    layout: Layout,
    *,
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    scale: float = 0.3,
    rounding: float | None = None,
    alone: bool = False,
) -> None:
    """Errors against float64 are not above those of eager PyTorch in `dtype`, up to rounding.

    alone: ours gets the queries of completions alone, and must say the same about them.
    """
    q, k, v, grad = make(layout, heads, head_dim, dtype, device)
    asking = torch.ones(len(q), dtype=torch.bool, device=device)
    if alone:
        asking = of_completions(layout).to(device)
        grad[~asking] = 0
    ours = run(attend, [q[asking], k, v, grad[asking]], layout, scale)
    rival = run(eager, [q, k, v, grad], layout, scale)
    truth = run(reference.prefix_attention, [x.double() for x in (q, k, v, grad)], layout, scale)
    for results in (rival, truth):
        results[:2] = (x[asking] for x in results[:2])
    for name, mine, other, exact in zip(NAMES, ours, rival, truth, strict=True):
        assert mine.shape == exact.shape and mine.dtype == dtype
        allowed = (other.double() - exact).norm()
        allowed += (ROUNDING[dtype] if rounding is None else rounding) * exact.norm()
        error = (mine.double() - exact).norm()
        assert error <= allowed, f"{name}: error {error:.1e} > {allowed:.1e} of {exact.norm():.1e}"
