"""Attention over a shared prompt by others' code: padded rows, or the prompt's keys repeated.

Rivals hold their inputs in the layout that they want, so what is timed is attention alone: neither
gathering q, k and v from packed rows nor projecting a repeated prompt counts against them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from benchmarks.timing import Variants


@dataclass
class AttentionData:
    """Packed rows of one prompt and its completions."""

    q: Tensor  # (T, Hq, D)
    k: Tensor  # (T, Hkv, D)
    v: Tensor  # (T, Hkv, D)
    grad: Tensor  # (T, Hq, D)
    prompt_len: int
    cu_seqlens: Tensor  # (B + 1,) int32 on the CPU

    @property
    def lengths(self) -> list[int]:
        """Of the completions."""
        return self.cu_seqlens.diff().tolist()

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        prompt = self.prompt_len
        own = sum(n * (n + 1) // 2 + n * prompt for n in self.lengths)
        return prompt * (prompt + 1) // 2 + own

    def leaves(self) -> list[Tensor]:
        """q, k and v, fresh, requiring gradients."""
        return [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]

    def first(self, count: int) -> AttentionData:
        """The prompt and its first `count` completions."""
        bounds = self.cu_seqlens[: count + 1]
        rows = slice(0, self.prompt_len + int(bounds[-1]))
        tensors = (x[rows] for x in (self.q, self.k, self.v, self.grad))
        return AttentionData(*tensors, self.prompt_len, bounds)


def random_data(
    heads: tuple[int, int], size: int, prompt_len: int, lengths: Tensor, device: str
) -> AttentionData:
    """bf16 numbers of unit size; lengths (B,)."""
    torch.manual_seed(0)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    rows = prompt_len + int(cu_seqlens[-1])
    q, k, v, grad = (
        torch.randn(rows, count, size, device=device).bfloat16()
        for count in (heads[0], heads[1], heads[1], heads[0])
    )
    return AttentionData(q, k, v, grad, prompt_len, cu_seqlens)


def plain(q: Tensor, k: Tensor, v: Tensor, prompt_len: int, cu_seqlens: Tensor) -> Tensor:
    """One sequence after the other in the dtype of q, packed in and out: for checks."""
    outs = [_causal(q[:prompt_len], k[:prompt_len], v[:prompt_len])]
    for low, high in pairwise((prompt_len + cu_seqlens).tolist()):
        keys, values = (torch.cat([x[:prompt_len], x[low:high]]) for x in (k, v))
        outs.append(_causal(q[low:high], keys, values))
    return torch.cat(outs)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    later = torch.ones_like(scores[0], dtype=torch.bool).triu(len(k) - len(q) + 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    p = scores.masked_fill(later, -torch.inf).softmax(-1, dtype=wide).to(q.dtype)
    return torch.einsum("hqk,khd->qhd", p, v)


def passes(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Variants:
    """`attend(*inputs)` without gradients, and with the backward pass."""

    def forward() -> None:
        with torch.no_grad():
            attend(*inputs)

    def both() -> None:
        attend(*(x.detach().requires_grad_() for x in inputs)).backward(grad)

    return {"forward": forward, "forward and backward": both}


def rivals(data: AttentionData) -> dict[str, Variants]:
    """Name -> its `passes`."""
    return {
        "sdpa, padded rows": _padded(data),
        "sdpa, prompt's keys repeated": _repeated(data),
    }


def _padded(data: AttentionData) -> Variants:
    """Every completion behind a prompt of its own, all filled up to the longest."""
    prompt, longest = data.prompt_len, max(data.lengths)
    shape = (len(data.lengths), data.q.shape[1], prompt + longest, data.q.shape[2])
    inputs = [_fill(x, (*shape[:1], x.shape[1], *shape[2:])) for x in (data.q, data.k, data.v)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(q, k, v, is_causal=True)

    return passes(attend, inputs, _fill(data.grad, shape))


def _repeated(data: AttentionData) -> Variants:
    """Completions filled up to the longest; each gets a copy of the prompt's keys (arXiv
    2506.05433)."""
    prompt, longest, count = data.prompt_len, max(data.lengths), len(data.lengths)
    size = data.q.shape[2]
    heads = [x[:prompt].transpose(0, 1)[None] for x in (data.q, data.k, data.v)]
    tails = [_fill(x, (count, x.shape[1], longest, size)) for x in (data.q, data.k, data.v)]
    mask = causal_lower_right(longest, prompt + longest)

    def attend(*given: Tensor) -> Tensor:
        head, tail = given[:3], given[3:]
        keys, values = (
            torch.cat([head[i].expand(count, -1, -1, -1), tail[i]], dim=2) for i in (1, 2)
        )
        own = _sdpa(tail[0], keys, values, attn_mask=mask)
        return torch.cat([_sdpa(*head, is_causal=True).flatten(), own.flatten()])

    inputs = [*heads, *tails]
    return passes(attend, inputs, torch.ones_like(torch.cat([heads[0].ravel(), tails[0].ravel()])))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, **options)


def _fill(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, device=like.device).to(like.dtype)
