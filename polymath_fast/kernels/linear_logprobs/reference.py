"""Log-probs and entropies of an LM head in plain PyTorch: the specification.

Rows are taken a few at a time and the logits of each chunk are computed again in the backward
pass, so that memory stays bounded at any N and V.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from polymath_fast.kernels.autograd import gradients_of, in_fresh_thread
from polymath_fast.kernels.checks import working_dtype
from polymath_fast.kernels.token_logprobs.reference import token_logprobs

CHUNK_ELEMENTS = 2**25
"""logits held at once: 128 MiB of fp32"""


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden` (N, H), `weight` (V, H), `targets` (N,) -> logprobs (N,), entropy (N,)."""
    dtype = working_dtype(hidden.dtype)
    # One cast for all chunks: their weight gradients are then added up in fp32.
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])

    def head(some: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # 0 * NaN is NaN: a broken row must not even be multiplied with its zero gradient
        sound = some.isfinite().all(-1, keepdim=True)
        with torch.autocast(some.device.type, enabled=False):
            some = torch.where(sound, some, 0).to(dtype)
            logits = torch.nn.functional.linear(some, weight, bias)
            return token_logprobs(torch.where(sound, logits, torch.nan), targets, temperature)

    parts = [
        checkpoint(head, some, wanted, use_reentrant=False)
        for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logprobs, entropy = (torch.cat(results) for results in zip(*parts, strict=True))
    return logprobs, entropy


def gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    by_logprob: torch.Tensor,
    by_entropy: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """By hidden, weight and bias, of a loss with these derivatives (N,) by their log-probs."""

    def head(*leaves: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_logprobs(leaves[0], leaves[1], targets, leaves[2], temperature)

    given = (head, (hidden, weight, bias), needs, (by_logprob, by_entropy))
    return tuple(in_fresh_thread(lambda: gradients_of(*given), hidden.device))
