"""Drawing tokens from rows of logits, with the log-prob of what was drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from polymath_fast.kernels.cpu.recorded_head import Recording

_BLOCK = 256  # vocabulary columns whose mass is summed before the draw is located inside them


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    vocab: int | None = None,
    recording: Recording | None = None,
    branches: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw C tokens from softmax(logits / temperature) by inverting its distribution function.

    One uniform number a row and two short cumulative sums (over blocks of columns, then inside the
    chosen block) replace a random number for every vocabulary entry.

    Args:
        logits: (B, V), any float dtype; computed with in float32.
        uniforms: (C,) float64 in [0, 1); ignored when temperature is 0.
        temperature: 0 takes the largest logit and reports its log-prob at temperature 1.
        vocab: columns from this one on are padding; None = there is none.
        recording: where to keep the distributions, on a CPU.
        branches: (C,) int64, the row of logits for each draw; None = C is B, and each has its own.

    Returns:
        tokens (C,) int64, logprobs (C,) float32.
    """
    vocab = logits.shape[1] if vocab is None else vocab
    if logits.device.type == "cpu" and logits.dtype != torch.float64:
        return _draw_on_cpu(logits, uniforms, temperature, vocab, recording, branches)
    if branches is not None and not torch.equal(branches, torch.arange(len(logits))):
        logits = logits[branches.to(logits.device)]
    logits, greedy = logits[:, :vocab], temperature == 0
    scaled = logits.float() if greedy else logits.float() / temperature
    log_norm = torch.logsumexp(scaled, dim=-1)  # (B,)
    tokens = scaled.argmax(-1) if greedy else _invert(scaled, log_norm, uniforms)
    logprobs = scaled.gather(-1, tokens[:, None])[:, 0] - log_norm
    return tokens, logprobs.clamp_(max=0)


def _draw_on_cpu(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    vocab: int,
    recording: Recording | None,
    branches: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from polymath_fast.kernels.cpu.draw import draw
    from polymath_fast.kernels.cpu.operands import bits
    from polymath_fast.kernels.cpu.threads import parallel, split

    count = len(uniforms)
    tokens, logprobs = torch.empty(count, dtype=torch.int64), torch.empty(count)
    branches = torch.arange(count) if branches is None else branches
    order = branches.argsort(stable=True)
    bounds = torch.searchsorted(branches[order], torch.arange(len(logits) + 1))
    recording = recording or Recording.nowhere(len(logits), count)
    half, kept = logits.dtype == torch.float16, recording.exponentials
    nothing = [kept[:0].to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    pair = (kept, nothing[1]) if kept.dtype == torch.float32 else (nothing[0], kept)
    parallel(
        draw,
        split(len(logits)),
        bits(logits.contiguous().view(torch.bfloat16) if half else logits.contiguous()),
        vocab,
        half,
        np.float32(1 / (temperature or 1)),
        temperature == 0,
        order.numpy(),
        bounds.numpy(),
        uniforms.contiguous().numpy(),
        tokens.numpy(),
        logprobs.numpy(),
        recording.kept.numpy(),
        *map(bits, pair),
        recording.places.numpy(),
        recording.found.numpy(),
    )
    return tokens, logprobs


def _invert(scaled: Tensor, log_norm: Tensor, uniforms: Tensor) -> Tensor:
    rows, vocab = scaled.shape
    probs = (scaled - log_norm[:, None]).exp_()
    padding = -vocab % _BLOCK
    if padding:
        probs = torch.nn.functional.pad(probs, (0, padding))
    blocks = probs.view(rows, -1, _BLOCK)
    mass = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (B, V / _BLOCK)
    target = (uniforms * mass[:, -1])[:, None]
    block = torch.searchsorted(mass, target, right=True).clamp_(max=mass.shape[1] - 1)
    below = torch.where(block > 0, mass.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    inner = inside.to(torch.float64).cumsum(-1)
    column = torch.searchsorted(inner, target - below, right=True)
    last = (inside > 0).to(torch.int64).cumsum(-1).argmax(-1, keepdim=True)  # never a zero entry
    return (block * _BLOCK + torch.minimum(column, last))[:, 0]
