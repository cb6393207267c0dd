"""The sections of the GPU suite: each returns "rows" of times or "values", ready for JSON."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import gpu_rivals
from benchmarks.gpu_timing import Timing, copy_rate, gemm_rate, interleave
from polymath_fast.kernels import (
    PolicyLossSpec,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    token_logprobs,
)
from polymath_fast.kernels.triton import coefficients, head

ROOT = Path(__file__).parents[1]
LENGTH = 512
"""tokens a completion"""
LOGPROB_ERROR = 1e-5
GRADIENT_ERROR = 3e-3
"""relative to the gradient's norm; rounding the result to bf16 makes 1.7e-3"""
TILES = (
    head.Tiles(128, 256, 64, 8, 3),
    head.Tiles(128, 256, 64, 8, 4),
    head.Tiles(128, 128, 64, 4, 3),
    head.Tiles(128, 128, 64, 8, 4),
    head.Tiles(256, 128, 64, 8, 3),
    head.Tiles(128, 256, 64, 8, 3, group=8),
    head.Tiles(128, 256, 64, 8, 3, group=32),
)


@cache
def _rates() -> tuple[float, float]:
    """FLOP/s of bf16 products and bytes/s of copies, measured once."""
    return gemm_rate(), copy_rate()


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


def _head(count: int, vocab: int, depth: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(count, depth, device="cuda").bfloat16()
    weight = (torch.randn(vocab, depth, device="cuda") * 3 / depth**0.5).bfloat16()
    targets = torch.randint(vocab, (count,), device="cuda")
    hidden[::2] += weight[targets[::2]]
    return hidden, weight, targets


def _batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) advantages, the same within a completion, and cu_seqlens."""
    advantages = torch.randn(count // LENGTH, device="cuda").repeat_interleave(LENGTH)
    ends = torch.arange(0, count + 1, LENGTH, device="cuda", dtype=torch.int32)
    return advantages, ends


def correct_rows() -> dict[str, Any]:
    """`token_logprobs` and both ways of `grpo_loss` against float64."""
    logits, targets = _logits(512, 151_936)
    advantages, ends = _batch(512)
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
    """`linear_grpo_loss` and `linear_logprobs` against the reference in fp32, all rows."""
    values = {}
    for depth, vocab in ((1536, 151_936), (3584, 152_064)):
        hidden, weight, targets = _head(2048, vocab, depth)
        advantages, ends = _batch(2048)
        hidden[::97] *= 8
        found = []
        for impl in ("triton", "reference"):
            leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
            spec = PolicyLossSpec(entropy_coef=0.01)
            out = linear_grpo_loss(*leaves, targets, advantages, ends, spec=spec, impl=impl)
            out.loss.backward()
            found.append([out.logprobs, *(leaf.grad for leaf in leaves)])
        logprobs, truth = found[0][0], found[1][0]
        usual = truth > -30
        error = (logprobs - truth)[usual].abs().max()
        values[f"{depth} logprob error"] = float(error)
        values[f"{depth} hidden gradient error"] = _relative(found[0][1], found[1][1])
        values[f"{depth} weight gradient error"] = _relative(found[0][2], found[1][2])
        again, _ = linear_logprobs(hidden, weight, targets, impl="triton")
        values[f"{depth} logprobs of linear_logprobs error"] = float((again - logprobs).abs().max())
    return _gate(values)


def _relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def _gate(values: dict[str, float]) -> dict[str, Any]:
    """Values, and an error that keeps the suite from passing if one is too large."""
    limits = {n: GRADIENT_ERROR if "gradient" in n else LOGPROB_ERROR for n in values}
    wrong = {n: v for n, v in values.items() if not v <= limits[n]}
    return {"values": values} | ({"error": f"beyond the limits: {wrong}"} if wrong else {})


def time_token_logprobs() -> dict[str, Any]:
    """Forward, N = 8192, V = 151936."""
    logits, targets = _logits(8192, 151_936)
    variants = {"triton": lambda: token_logprobs(logits, targets, impl="triton")}
    variants |= gpu_rivals.logprobs_from_logits(logits, targets)
    return _table(variants, byte_count=logits.nbytes)


def time_grpo_loss() -> dict[str, Any]:
    """Forward and backward, N = 8192, V = 151936 and 49152."""
    found: list[dict[str, Any]] = []
    for vocab in (151_936, 49_152):
        logits, targets = _logits(8192, vocab)
        advantages, ends = _batch(8192)
        old = token_logprobs(logits, targets, impl="triton")[0]

        def ours(
            given: torch.Tensor | None,
            inplace: bool,
            logits=logits,
            batch=(targets, advantages, ends),
        ) -> None:
            leaf = logits.detach().requires_grad_()
            # a view, not a leaf: only such logits may be overwritten
            values = leaf.view_as(leaf)
            grpo_loss(
                values, *batch, old_logprobs=given, inplace=inplace, impl="triton"
            ).loss.backward()

        def split(ours=ours) -> None:
            with mock.patch.object(coefficients, "_probe", _never_known):
                ours(None, True)

        kept = logits.clone()
        variants: gpu_rivals.Variants = {
            "triton on-policy": lambda ours=ours: ours(None, False),
            "triton on-policy in place": lambda ours=ours: ours(None, True),
            "triton off-policy in place": lambda ours=ours, old=old: ours(old, True),
            "triton on-policy, two kernels": split,
        }
        variants |= gpu_rivals.loss_from_logits(kept, targets, advantages, LENGTH)
        table = _table(variants, byte_count=2 * logits.nbytes)
        found += [row | {"what": f"V={vocab} {row['what']}"} for row in table["rows"]]
    return {"rows": found}


def _never_known(spec: PolicyLossSpec, given: tuple[str, ...]) -> dict[float, torch.Tensor]:
    return {a: torch.tensor([a, torch.nan]) for a in (1.0, -1.0, 0.0)}


def time_head_small() -> dict[str, Any]:
    """H = 1536, V = 151936."""
    return _time_head(1536, 151_936)


def time_head_large() -> dict[str, Any]:
    """H = 3584, V = 152064."""
    return _time_head(3584, 152_064)


def _time_head(depth: int, vocab: int) -> dict[str, Any]:
    """Forward and backward, N = 8192 beside everybody, N = 65536 beside who can."""
    found: list[dict[str, Any]] = []
    for count in (8192, 65_536):
        hidden, weight, targets = _head(count, vocab, depth)
        advantages, ends = _batch(count)

        def ours(
            masked: torch.Tensor | None = None,
            data=(hidden, weight, targets),
            batch=(advantages, ends),
        ) -> None:  # noqa: E501
            leaves = [t.detach().requires_grad_() for t in data[:2]]
            linear_grpo_loss(*leaves, data[2], *batch, mask=masked, impl="triton").loss.backward()

        half = torch.rand(count, device="cuda") < 0.5
        variants: gpu_rivals.Variants = {
            "triton": ours,
            "triton, half of the tokens masked": lambda ours=ours, half=half: ours(half),
            "triton, cuBLAS logits and row kernels": lambda ours=ours: _without_exps(ours),
        }
        rivals = gpu_rivals.loss_from_head(hidden, weight, targets, advantages, LENGTH)
        if count > 8192:
            rivals.pop("liger fused linear grpo", None)
        table = _table(
            variants | rivals,
            flop_count=6 * count * vocab * depth,
            repeats=5 if count < 9000 else 3,
        )
        found += [row | {"what": f"N={count} {row['what']}"} for row in table["rows"]]
    return {"rows": found}


def _without_exps(run: Callable[[], None]) -> None:
    """`run` with fp32 logits from cuBLAS, for comparison with the kernel that never stores them."""
    construct = head.Head.__init__

    def patched(self: head.Head, *inputs: Any) -> None:
        construct(self, *inputs)
        self.by_exps = False
        self.rows = max(self.rows // 3 // 256 * 256, 256)

    with mock.patch.object(head.Head, "__init__", patched):
        run()


def time_tiles() -> dict[str, Any]:
    """The product alone, in chunks, for shapes of tiles: forward pass without E."""
    found: list[dict[str, Any]] = []
    for depth, vocab in ((1536, 151_936), (3584, 152_064)):
        hidden, weight, targets = _head(8192, vocab, depth)
        variants = {}
        for tiles in TILES:
            for keep in (False, True):
                label = f"H={depth} {tiles.m}x{tiles.n}x{tiles.k} w{tiles.warps} s{tiles.stages} g{tiles.group}"  # noqa: E501
                variants[label + " stored" * keep] = _product_alone(
                    hidden, weight, targets, tiles, keep
                )
        logits = torch.empty(8192, vocab, dtype=torch.bfloat16, device="cuda")
        variants[f"H={depth} cuBLAS bf16 product"] = lambda a=hidden, b=weight, out=logits: (
            torch.mm(a, b.T, out=out)
        )
        found += _table(variants, flop_count=2 * 8192 * vocab * depth)["rows"]
    return {"rows": found}


def _product_alone(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, tiles: head.Tiles, keep: bool
) -> Callable[[], None]:
    lm_head = head.Head(hidden, weight, None, targets, 1.0)
    lm_head.tiles = replace(tiles)
    index = torch.arange(len(hidden), device="cuda")
    return lambda: lm_head.chunk(index, slice(0, len(hidden)), keep=keep) and None


def gpu_tests() -> dict[str, Any]:
    """The tests that are marked gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-x", "tests/kernels"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    print(run.stdout[-3000:])
    summary = run.stdout.strip().splitlines()[-1] if run.stdout.strip() else run.stderr[-300:]
    return {"summary": summary} | ({"error": summary} if run.returncode else {})


def _table(
    variants: gpu_rivals.Variants,
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
