"""A stand-in for the two functions of flash-attn 2.8 that prefix_attention calls.

Same arguments, shapes and layouts (flash_attn_interface.py and csrc/flash_attn/flash_api.cpp),
same refusals; computed in float32 by torch. `calls` keeps the arguments for the tests.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class FlashDouble(ModuleType):
    """Stands for the module `flash_attn.flash_attn_interface`."""

    def __init__(self) -> None:
        super().__init__("flash_attn.flash_attn_interface")
        self.calls: list[dict[str, Any]] = []

    def _flash_attn_varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
        alibi_slopes: Tensor | None = None, return_softmax: bool = False,
        block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None, zero_tensors: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        assert dropout_p == 0 and window_size_left == window_size_right == -1 and softcap == 0
        assert max_seqlen_q > 1, "the library would return another layout of softmax_lse"
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        self.calls.append({"kind": "forward", "queries": cu_seqlens_q, "causal": causal})
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
        for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
            scores = _scores(q[rows], k[keys], softmax_scale, causal)
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), _wide(v[keys], q)).to(
                q.dtype
            )
            lse[:, rows] = scores.logsumexp(-1)
        return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
        softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
        softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
        rng_state: Tensor | None = None, zero_tensors: bool = False,
    ) -> Tensor:  # fmt: skip
        assert dropout_p == 0 and window_size_left == window_size_right == -1 and softcap == 0
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert softmax_lse.shape == q.shape[1::-1] and softmax_lse.is_contiguous()
        self.calls.append(
            {"kind": "backward", "queries": cu_seqlens_q, "deterministic": deterministic}
        )
        group = q.shape[1] // k.shape[1]
        delta = (dout.float() * out.float()).sum(-1).T  # (Hq, rows)
        for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
            p = (
                _scores(q[rows], k[keys], softmax_scale, causal) - softmax_lse[:, rows, None]
            ).exp()
            d_p = torch.einsum("qhd,khd->hqk", dout[rows].float(), _wide(v[keys], q))
            d_s = p * (d_p - delta[:, rows, None]) * softmax_scale
            dq[rows] = torch.einsum("hqk,khd->qhd", d_s, _wide(k[keys], q)).to(q.dtype)
            d_k = torch.einsum("hqk,qhd->khd", d_s, q[rows].float())
            d_v = torch.einsum("hqk,qhd->khd", p, dout[rows].float())
            for target, found in ((dk, d_k), (dv, d_v)):
                target[keys] = found.unflatten(1, (-1, group)).sum(2).to(q.dtype)
        return delta


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> None:
    assert q.dtype in (torch.bfloat16, torch.float16, torch.float32)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[2] % 8 == 0 and q.shape[2] <= 256 and k.shape == v.shape
    for offsets, longest, rows in (
        (cu_seqlens_q, max_seqlen_q, len(q)),
        (cu_seqlens_k, max_seqlen_k, len(k)),
    ):
        assert offsets.dtype == torch.int32 and offsets[0] == 0 and offsets[-1] == rows
        assert offsets.diff().min() > 0 and offsets.diff().max() <= longest
    assert len(cu_seqlens_q) == len(cu_seqlens_k)


def _sequences(queries: Tensor, keys: Tensor):
    pairs = (itertools.pairwise(offsets.tolist()) for offsets in (queries, keys))
    return [tuple(slice(*bounds) for bounds in pair) for pair in zip(*pairs, strict=True)]


def _wide(x: Tensor, q: Tensor) -> Tensor:
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q.float(), _wide(k, q)) * scale
    if causal:
        late = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(late, -torch.inf)
    return scores
