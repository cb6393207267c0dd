"""Attention of many completions over one prompt that is computed and stored once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from polymath_fast.kernels import checks, dispatch
from polymath_fast.kernels.prefix_attention.blocks import to_blocks

NO_TREES = {"flash": "it takes no tree of segments (triton, cpu and reference do)"}
"""implementation -> why it refuses `parents`"""


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_len: int,
    cu_seqlens: Tensor,
    *,
    parents: Sequence[int] | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal attention of rows packed as [prompt | completion_1 | ... | completion_B].

    The prompt attends causally to itself; completion i attends to the whole prompt and causally to
    itself, never to another completion. T = prompt_len + cu_seqlens[-1] rows. With `parents` the
    completions are segments of a tree: each attends to the prompt, to its ancestors and causally to
    itself, so that completions which begin alike share the rows of their beginning.

    Args:
        q: (T, Hq, D), any of bfloat16, float16, float32, float64; strided views are fine. Or
            (T - prompt_len, Hq, D), the completions' rows alone, where the prompt's own output is
            known already.
        k: (T, Hkv, D), Hq a multiple of Hkv, same dtype and device as q.
        v: (T, Hkv, D).
        prompt_len: rows of the prompt, at least 1.
        cu_seqlens: (B + 1,) int32 on the CPU, completion offsets counted from the prompt's end;
            starts at 0, never falls; an empty completion is two equal offsets.
        parents: (B,) the segment that each one continues, -1 for the prompt; None = all continue
            the prompt. In preorder: what continues a segment stands right behind it.
        scale: factor on the scores, above 0; None = 1 / sqrt(D).
        impl: "auto", "reference", "cpu", "triton" or "flash". "triton" takes D up to 256, up to 128
            in float32; "flash" (the flash-attn package) multiples of 8 up to 256, not float32, no
            tree.

    Returns:
        q's shape and dtype, differentiable in q, k and v, once. Deterministic.

    Raises:
        ValueError: shapes, dtypes, offsets or parents do not fit, or `impl` cannot run here.

    Source: the online softmax of FlashAttention (arXiv 2205.14135) over a shared prefix as in
    Hydragen (arXiv 2402.05099), with the exact backward of merged pieces.
    """
    block = (prompt_len, cu_seqlens, () if parents is None else parents)
    return prefix_attention_blocks(q, k, v, [block], scale=scale, impl=impl)


@dispatch.untraced
def prefix_attention_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Sequence[tuple[int, Tensor] | tuple[int, Tensor, Sequence[int]]],
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """`prefix_attention` of several prompts, one block of rows after the other, in one call.

    Args:
        blocks: (prompt_len, cu_seqlens) of each, or (prompt_len, cu_seqlens, parents); together
            they cover the T rows of k and v.
        q: T rows, or those of the completions of all blocks alone.
        k, v, scale, impl: as for `prefix_attention`. Returns and raises the same.
    """
    _check(q, k, v, scale)
    packed = to_blocks(blocks, q.shape[0], k.shape[0])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    unable = NO_TREES if any(block.parents for block in packed) else {}
    implementation = dispatch.resolve("prefix_attention", q, impl, unable)
    return implementation.prefix_attention(q, k, v, packed, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(name, value)
    if q.dim() != 3 or k.shape != v.shape or k.dim() != 3 or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: want (T, Hq, D), "
            "(T, Hkv, D), (T, Hkv, D) with the same D"
        )
    if q.dtype not in checks.FLOATS or 0 in (q.shape[2], q.shape[1], k.shape[1]):
        raise ValueError(
            f"q is {q.dtype} {tuple(q.shape)}, k {tuple(k.shape)}: want bf16, fp16, fp32 or fp64, "
            "and at least one head of at least one entry"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if not (q.dtype == k.dtype == v.dtype) or not (q.device == k.device == v.device):
        raise ValueError(
            f"q, k, v differ: {q.dtype}/{q.device}, {k.dtype}/{k.device}, {v.dtype}/{v.device}"
        )
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale {scale} must be above 0 and finite, e.g. {q.shape[2] ** -0.5}")
