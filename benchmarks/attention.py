"""The case of prefix_attention for `registry`, and the check it must pass on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import attention_rivals
from benchmarks.attention_rivals import AttentionData
from benchmarks.case import Case, relative_error
from polymath_fast.kernels import prefix_attention
from polymath_fast.kernels.active_vocabulary import ROUNDING


def prefix_attention_case(device: str) -> Case:
    """SmolLM2's heads on a CPU, Qwen2.5-1.5B's on a GPU; completions of unlike lengths."""
    heads, size, prompt, count, longest = (
        ((12, 2), 128, 512, 64, 1024) if device == "cuda" else ((9, 3), 64, 256, 64, 96)
    )
    lengths = torch.linspace(longest // 3, longest, count).int()
    data = attention_rivals.random_data(heads, size, prompt, lengths, device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return prefix_attention(q, k, v, data.prompt_len, data.cu_seqlens)

    ours = attention_rivals.passes(attend, [data.q, data.k, data.v], data.grad)
    named = {"ours": ours} | attention_rivals.rivals(data)
    return Case(
        shape={"T": len(data.q), "P": prompt, "B": count, "Hq": heads[0], "Hkv": heads[1]},
        variants={name: passes["forward and backward"] for name, passes in named.items()},
        baseline="sdpa, padded rows",
        check=lambda: check_attention(data.first(8), prefix_attention),
        flops=14.0 * data.pairs * heads[0] * size,
    )


def check_attention(data: AttentionData, attend: Callable[..., torch.Tensor]) -> dict[str, float]:
    """Errors against fp64; they may be those of eager attention in bf16, or of rounding."""
    inputs = (data.prompt_len, data.cu_seqlens)
    results = []
    for function, dtype in (
        (attend, data.q.dtype),
        (attention_rivals.plain, data.q.dtype),
        (attention_rivals.plain, torch.float64),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (data.q, data.k, data.v)]
        out = function(*leaves, *inputs)
        out.backward(data.grad.to(dtype))
        results.append([out.detach(), *(x.grad for x in leaves)])
    errors = {}
    for name, mine, eager, exact in zip(("out", "d_q", "d_k", "d_v"), *results, strict=True):
        errors[name], errors[f"{name} of eager"] = (relative_error(x, exact) for x in (mine, eager))
        limit = 1.05 * max(errors[f"{name} of eager"], ROUNDING)
        assert errors[name] <= limit, f"{name}: error {errors[name]:.1e} > {limit:.1e}, not timed"
    return errors
