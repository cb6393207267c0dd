"""The sections of the GPU suite: each returns "rows" of times or "values", ready for JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import torch

from benchmarks import gpu_rivals, gpu_sizes
from benchmarks.gpu_timing import Timing, interleave
from benchmarks.rivals import HeadData
from benchmarks.timing import Variants, copy_rate, gemm_rate
from polymath_fast.kernels import (
    PolicyLossSpec,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    token_logprobs,
)
from polymath_fast.kernels.grpo_loss import _triton as logit_loss
from polymath_fast.kernels.triton import head

LOGPROB_ERROR = 1e-5
HEAD_ERROR = 2e-5
"""fp32 sums of thousands of products, logits of 30: what a product of fp32 itself is off by"""
GRADIENT_ERROR = 3e-3
"""relative to the gradient's norm; rounding the result to bf16 makes 1.7e-3"""
AUTO_ERROR = 2.6e-3
"""what `vocab_tol="auto"` may add"""
COLUMNS_KEPT = 0.5
"""share; of those of `few_columns`, where one in twenty matters"""


@cache
def _rates() -> tuple[float, float]:
    """FLOP/s of bf16 products and bytes/s of copies, measured once."""
    return gemm_rate("cuda"), copy_rate("cuda")


def rates() -> dict[str, Any]:
    """What this GPU reaches."""
    gemm, copy = _rates()
    return {"values": {"bf16 TFLOP/s": gemm / 1e12, "copy TB/s": copy / 1e12}}


def _logits(count: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.empty(count, vocab, dtype=torch.bfloat16, device="cuda").normal_(0, 4)
    targets = torch.randint(vocab, (count,), device="cuda")
    logits[torch.arange(0, count, 2, device="cuda"), targets[::2]] = 21.0
    return logits, targets


def random_head(
    count: int, vocab: int, depth: int, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(count, depth, device=device).bfloat16()
    weight = (torch.randn(vocab, depth, device=device) * 3 / depth**0.5).bfloat16()
    targets = torch.randint(vocab, (count,), device=device)
    hidden[::2] += weight[targets[::2]]
    return hidden, weight, targets


def _batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) advantages and cu_seqlens."""
    torch.manual_seed(1)
    length = gpu_sizes.SIZES.length
    ends = torch.arange(0, count + 1, length, device="cuda", dtype=torch.int32)
    return torch.randn(count // length, device="cuda"), ends


def correct_rows() -> dict[str, Any]:
    """`token_logprobs` and both ways of `grpo_loss` against float64."""
    count = gpu_sizes.SIZES.checked_rows
    logits, targets = _logits(count, gpu_sizes.SIZES.vocabs[0])
    advantages, ends = _batch(count)
    exact = logits.double()
    logprobs, entropy = token_logprobs(logits, targets, impl="triton")
    truth = token_logprobs(exact, targets, impl="reference")
    values = {
        "logprob error": float((logprobs - truth[0]).abs().max()),
        "entropy error": float((entropy - truth[1]).abs().max()),
    }
    old = logprobs + 0.1 * torch.randn_like(logprobs)
    for name, given in (("on-policy", None), ("off-policy", old)):
        spec = PolicyLossSpec(entropy_coef=0.01)
        gradients = []
        for leaf, impl in ((logits.clone(), "triton"), (exact.clone(), "reference")):
            leaf.requires_grad_()
            kept = None if given is None else given.to(torch.float64)
            out = grpo_loss(
                leaf, targets, advantages, ends, old_logprobs=kept, spec=spec, impl=impl
            )
            out.loss.backward()
            gradients.append(leaf.grad)
        values[f"{name} gradient error"] = _relative(*gradients)
    return _gate(values)


def correct_head() -> dict[str, Any]:
    """`linear_grpo_loss` and `linear_logprobs` against float64 log-probs and fp32 gradients."""
    values, sizes = {}, gpu_sizes.SIZES
    for depth, vocab in (sizes.small_head, sizes.large_head):
        hidden, weight, targets = random_head(sizes.checked_head_rows, vocab, depth)
        advantages, ends = _batch(sizes.checked_head_rows)
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
        again, _ = linear_logprobs(hidden, weight, targets, impl="triton")
        values |= {
            f"{depth} head logprob error": float((found[0][0][rows] - truth).abs().max()),
            f"{depth} head logprob difference": float((again - found[0][0]).abs().max()),
            f"{depth} hidden gradient error": _relative(found[0][1], found[1][1]),
            f"{depth} weight gradient error": _relative(found[0][2], found[1][2]),
        }
        del found, exact
        hidden[::97] /= 8
        data = HeadData(hidden, weight, targets, advantages, again)
        values |= {f"{depth} {name}": value for name, value in _auto_errors(data).items()}
    return _gate(values)


def _auto_errors(data: HeadData) -> dict[str, float]:
    """What leaving columns out changes in the gradients, and the share of columns kept."""
    few, (_, ends) = few_columns(data), _batch(len(data.targets))
    found = []
    for tolerance in ("auto", 0.0):
        leaves = few.leaves()
        inputs = (*leaves, few.targets, few.advantages, ends)
        out = linear_grpo_loss(*inputs, vocab_tol=tolerance, impl="triton")
        out.loss.backward()
        found.append((leaves[0].grad, leaves[1].grad, out.metrics))
    auto, exact = found
    return {
        "auto hidden gradient error": _relative(auto[0], exact[0]),
        "auto weight gradient error": _relative(auto[1], exact[1]),
        "columns kept": float(auto[2]["vocab/live_share"]),
    }


def _relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def _gate(values: dict[str, float]) -> dict[str, Any]:
    """Values, and an error that keeps the suite from passing if one is too large."""
    wrong = {n: v for n, v in values.items() if not v <= _limit(n)}
    return {"values": values} | ({"error": f"beyond the limits: {wrong}"} if wrong else {})


def _limit(what: str) -> float:
    if "columns kept" in what:
        return COLUMNS_KEPT
    if "gradient" in what:
        return GRADIENT_ERROR + AUTO_ERROR * ("auto" in what)
    return HEAD_ERROR if "head" in what else LOGPROB_ERROR


def time_token_logprobs() -> dict[str, Any]:
    """Forward, N = 8192, V = 151936."""
    logits, targets = _logits(gpu_sizes.SIZES.rows, gpu_sizes.SIZES.vocabs[0])
    ours = {"triton": lambda: token_logprobs(logits, targets, impl="triton")}
    variants = ours | gpu_rivals.token_logprobs(logits, targets)
    return timed_table(variants, byte_count=logits.nbytes)


def time_grpo_loss() -> dict[str, Any]:
    """Forward and backward, N = 8192, V = 151936 and 49152."""
    found: list[dict[str, Any]] = []
    for vocab in gpu_sizes.SIZES.vocabs:
        logits, targets = _logits(gpu_sizes.SIZES.rows, vocab)
        old = token_logprobs(logits, targets, impl="triton")[0]
        table = timed_table(_logit_variants(logits, targets, old), byte_count=2 * logits.nbytes)
        found += [row | {"what": f"V={vocab} {row['what']}"} for row in table["rows"]]
    return {"rows": found}


def _logit_variants(logits: torch.Tensor, targets: torch.Tensor, old: torch.Tensor) -> Variants:
    advantages, ends = _batch(len(targets))
    overwritten = logits.clone()

    def run(given: torch.Tensor | None, inplace: bool) -> None:
        leaf = (overwritten if inplace else logits).detach().requires_grad_()
        # a view, not a leaf: only such logits may be overwritten
        out = grpo_loss(
            leaf.view_as(leaf),
            targets,
            advantages,
            ends,
            old_logprobs=given,
            inplace=inplace,
            impl="triton",
        )
        out.loss.backward()

    def split() -> None:
        with mock.patch.object(logit_loss, "known_beforehand", lambda batch, spec: None):
            run(None, True)

    variants: Variants = {
        "triton on-policy": lambda: run(None, False),
        "triton on-policy in place": lambda: run(None, True),
        "triton on-policy in place, two kernels": split,
        "triton off-policy in place": lambda: run(old, True),
    }
    return variants | gpu_rivals.logit_losses(logits, targets, old, advantages)


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
        advantages, _ = _batch(count)
        old, _ = linear_logprobs(hidden, weight, targets, impl="triton")
        data = HeadData(hidden, weight, targets, advantages, old)
        rivals = gpu_rivals.head_losses(data)
        if count > sizes.rows:
            # their logits in fp32 alone are 40 GB, several times
            rivals.pop("eager")
            rivals.pop("liger, fused linear grpo", None)
        table = timed_table(
            _head_variants(data) | rivals,
            flop_count=6 * count * vocab * depth,
            repeats=5 if count == sizes.rows else 3,
        )
        found += [row | {"what": f"N={count} {row['what']}"} for row in table["rows"]]
    return {"rows": found}


def _head_variants(data: HeadData) -> Variants:
    count = len(data.targets)
    _, ends = _batch(count)
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


def timed_table(
    variants: Variants,
    *,
    byte_count: int | None = None,
    flop_count: int | None = None,
    repeats: int = 7,
) -> dict[str, Any]:
    """Times, each as a share of what the bytes or FLOPs that are needed would take at full rate."""
    gemm, copy = _rates()
    floor = flop_count / gemm if flop_count else byte_count / copy
    found = []
    for name, timing in interleave(variants, repeats=repeats).items():
        row = {"what": name} | timing.row() | _work(timing, floor, byte_count, flop_count)
        found.append(row)
    return {"rows": found}


def _work(
    timing: Timing, floor: float, byte_count: int | None, flop_count: int | None
) -> dict[str, Any]:
    if timing.median is None:
        return {}
    work = {"bytes": byte_count} if byte_count else {"flops": flop_count}
    return work | {"share": 1e3 * floor / timing.median}
