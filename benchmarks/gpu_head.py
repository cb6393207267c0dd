"""Sections of the GPU suite about the LM head and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks import gpu_rivals, gpu_sizes, gpu_timing
from benchmarks.case import relative_error
from benchmarks.gpu_sections import batch, gate, timed_table
from benchmarks.rivals import HeadData
from benchmarks.timing import Variants
from polymath_fast.kernels import PolicyLossSpec, linear_grpo_loss, linear_logprobs
from polymath_fast.kernels.triton import head


def random_head(
    count: int, vocab: int, depth: int, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(count, depth, device=device).bfloat16()
    weight = (torch.randn(vocab, depth, device=device) * 3 / depth**0.5).bfloat16()
    targets = torch.randint(vocab, (count,), device=device)
    hidden[::2] += weight[targets[::2]]
    return hidden, weight, targets


def correct_head() -> dict[str, Any]:
    """`linear_grpo_loss` and `linear_logprobs` against float64 log-probs and fp32 gradients."""
    values, sizes = {}, gpu_sizes.SIZES
    for depth, vocab in (sizes.small_head, sizes.large_head):
        hidden, weight, targets = random_head(sizes.checked_head_rows, vocab, depth)
        advantages, ends = batch(sizes.checked_head_rows)
        hidden[::97] *= 8
        found = []
        for impl, dtype in (("triton", torch.bfloat16), ("reference", torch.float32)):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
            spec = PolicyLossSpec(entropy_coef=0.01)
            out = linear_grpo_loss(*leaves, targets, advantages, ends, spec=spec, impl=impl)
            out.loss.backward()
            found.append([out.logprobs, *(leaf.grad for leaf in leaves)])
        rows = slice(1, 97)
        exact = (hidden[rows].double() @ weight.double().T).log_softmax(-1)
        truth = exact.gather(-1, targets[rows, None])[:, 0]
        theirs = torch.mm(hidden[rows], weight.T, out_dtype=torch.float32).log_softmax(-1)
        theirs = theirs.gather(-1, targets[rows, None])[:, 0]
        again, _ = linear_logprobs(hidden, weight, targets, impl="triton")
        values |= {
            f"torch {depth} head logprob error": float((theirs - truth).abs().max()),
            f"{depth} head logprob error": float((found[0][0][rows] - truth).abs().max()),
            f"{depth} head logprob difference": float((again - found[0][0]).abs().max()),
            f"{depth} hidden gradient error": relative_error(found[0][1], found[1][1]),
            f"{depth} weight gradient error": relative_error(found[0][2], found[1][2]),
        }
        del found, exact
        hidden[::97] /= 8
        data = HeadData(hidden, weight, targets, advantages, again)
        values |= {f"{depth} {name}": value for name, value in _auto_errors(data).items()}
    return gate(values)


def _auto_errors(data: HeadData) -> dict[str, float]:
    """What leaving columns out changes in the gradients, and the share of columns kept."""
    few, (_, ends) = few_columns(data), batch(len(data.targets))
    found = []
    for tolerance in ("auto", 0.0):
        leaves = few.leaves()
        inputs = (*leaves, few.targets, few.advantages, ends)
        out = linear_grpo_loss(*inputs, vocab_tol=tolerance, impl="triton")
        out.loss.backward()
        found.append((leaves[0].grad, leaves[1].grad, out.metrics))
    auto, exact = found
    return {
        "auto hidden gradient error": relative_error(auto[0], exact[0]),
        "auto weight gradient error": relative_error(auto[1], exact[1]),
        "columns kept": float(auto[2]["vocab/live_share"]),
    }


def time_head_small() -> dict[str, Any]:
    """H = 1536, V = 151936."""
    return _time_head(*gpu_sizes.SIZES.small_head)


def time_head_large() -> dict[str, Any]:
    """H = 3584, V = 152064."""
    return _time_head(*gpu_sizes.SIZES.large_head)


def _time_head(depth: int, vocab: int) -> dict[str, Any]:
    """Forward and backward, N = 8192 beside everybody, N = 65536 beside who can."""
    found: list[dict[str, Any]] = []
    sizes = gpu_sizes.SIZES
    for count in (sizes.rows, sizes.many_rows):
        hidden, weight, targets = random_head(count, vocab, depth)
        advantages, _ = batch(count)
        old, _ = linear_logprobs(hidden, weight, targets, impl="triton")
        data = HeadData(hidden, weight, targets, advantages, old)
        rivals = gpu_rivals.head_losses(data)
        if count > sizes.rows:
            # their logits in fp32 alone are 40 GB, several times
            rivals.pop("eager")
            rivals.pop("liger, fused linear grpo", None)
            # one more compilation, which could take the section's time
            rivals.pop("torch.compile, 8 chunks")
            # the slowest, and the one that leaves work out
            rivals.pop("verl chunked", None)
            rivals.pop(gpu_rivals.CCE_FILTERED, None)
        table = timed_table(
            _head_variants(data) | rivals,
            flop_count=6 * count * vocab * depth,
            repeats=5 if count == sizes.rows else 3,
        )
        found += [row | {"what": f"N={count} {row['what']}"} for row in table["rows"]]
        gpu_timing.keep({"rows": found})
    return {"rows": found}


def _head_variants(data: HeadData) -> Variants:
    count = len(data.targets)
    _, ends = batch(count)
    half = torch.rand(count, device="cuda") < 0.5
    few = few_columns(data)

    def run(data: HeadData = data, old: torch.Tensor | None = None, **options: Any) -> None:
        inputs = (*data.leaves(), data.targets, data.advantages, ends)
        linear_grpo_loss(*inputs, old_logprobs=old, impl="triton", **options).loss.backward()

    return {
        "triton on-policy": run,
        "triton off-policy": lambda: run(old=data.old_logprobs),
        "triton, half of the tokens masked": lambda: run(mask=half),
        "triton, 5 % of the columns live, auto": lambda: run(few, vocab_tol="auto"),
        "triton, gspo off-policy": lambda: run(
            old=data.old_logprobs, spec=PolicyLossSpec(loss_type="gspo")
        ),
        "triton, cuBLAS logits and row kernels": lambda: _without_exps(run),
    }


def few_columns(data: HeadData) -> HeadData:
    """All rows prefer the same 5 % of the vocabulary, by about 14 nats."""
    live = len(data.weight) // 20
    direction = torch.randn(data.hidden.shape[1], device="cuda")
    direction /= direction.norm()
    weight = data.weight.clone()
    weight[:live] += direction.to(weight.dtype)
    hidden = data.hidden + (14 * direction).to(data.hidden.dtype)
    return replace(data, hidden=hidden, weight=weight, targets=data.targets % live)


def _without_exps(run: Callable[[], None]) -> None:
    """`run` with fp32 logits from cuBLAS, for comparison with the kernel that never stores them."""
    construct = head.Head.__init__

    def patched(self: head.Head, *inputs: Any) -> None:
        construct(self, *inputs)
        self.by_exps = False
        self.rows = max(self.rows // 3 // 256 * 256, 256)

    with mock.patch.object(head.Head, "__init__", patched):
        run()
