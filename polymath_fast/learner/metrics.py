"""Sums of one batch's updates, kept on the device until the batch is done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from polymath_fast.config import Config
from polymath_fast.kernels import PolicyLossOutput, verify_targets
from polymath_fast.learner.mismatch import Mismatch, means
from polymath_fast.learner.packing import PackedBatch, token_counts
from polymath_fast.ranks import ALONE, Ranks


class UpdateMetrics:
    """Gathers per-token means over micro-batches and what each update reported."""

    def __init__(self, config: Config) -> None:
        self._mismatch = Mismatch(config)
        self._sums: dict[str, torch.Tensor] = {}
        self._maxima: dict[str, torch.Tensor] = {}
        self._updates: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._passes: Counter[str] = Counter()

    def add_microbatch(
        self, out: PolicyLossOutput, batch: PackedBatch, *, taped: bool = False
    ) -> None:
        """Take in one call of the loss; `taped`: whether the sampler's pass was the forward one."""
        rows = sum(int(block.cu_seqlens[-1]) for block in batch.blocks)
        self._passes.update(
            rows=rows,
            taped=rows * taped,
            saved=batch.rows_saved,
            batches=1,
            in_trees=batch.rows_saved > 0,
        )
        tokens = out.metrics["tokens"]
        weighted = {
            "policy/entropy": out.metrics["entropy"] * tokens,
            "policy/kl": self._kl(out, batch) * tokens,
            "policy/ratio_mean": out.metrics["ratio/mean"] * tokens,
            "tokens": tokens,
            "policy/loss": out.loss.detach(),
        }
        if "clip_ratio/region" in out.metrics:
            weighted["policy/clip_ratio"] = out.metrics["clip_ratio/region"] * tokens
        if not self._updates:  # the sampler's weights: before any update
            sampler = batch.sampling_logprobs
            self._mismatch.add(out.logprobs, sampler, batch.cu_seqlens, batch.multiplicity)
        self._raise("policy/ratio_max", out.metrics["ratio/max"])
        if "vocab/live_share" in out.metrics:
            weighted["vocab/live_share"] = out.metrics["vocab/live_share"] * tokens
            self._raise("vocab/error_bound", out.metrics["vocab/error_bound"])
        for name, value in weighted.items():
            self._sums[name] = self._sums.get(name, 0) + value

    def add_update(self, norm: torch.Tensor, updated: torch.Tensor) -> None:
        """Take in the gradient norm of one update and whether the weights changed."""
        self._updates.append((norm, updated))

    def result(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Means over everybody's tokens, maxima, the mean gradient norm; non-finite updates are
        counted.

        Raises:
            ValueError: a target lay outside the vocabulary.
        """
        sums, mismatch, maxima, passes = self._pooled(ranks)
        tokens = max(1.0, sums.pop("tokens"))
        loss = sums.pop("policy/loss") / max(1, len(self._updates))
        norms = [float(norm) for norm, updated in self._updates if updated]
        rows, saved, batches = (passes[name] for name in ("rows", "saved", "batches"))
        return {
            **{name: value / tokens for name, value in sums.items()},
            **maxima,
            **means(mismatch),
            "policy/loss": loss,
            "policy/grad_norm": sum(norms) / len(norms) if norms else float("nan"),
            "update/nonfinite": float(len(self._updates) - len(norms)),
            "update/skipped": 0.0,
            "packing/tree_used": passes["in_trees"] / max(1, batches),
            "packing/taped_ratio": passes["taped"] / max(1, rows),
            "packing/rows_saved_ratio": saved / max(1, rows + saved),
        }

    def _pooled(self, ranks: Ranks) -> tuple[dict[str, float], ...]:
        """Sums of losses, of mismatch, maxima, and counts of passes, of all processes."""
        if self._sums:
            verify_targets(self._sums["tokens"].device)
        maxima = {name: float(value) for name, value in self._maxima.items()}
        everyone = ranks.gather(
            [
                {name: float(value) for name, value in self._sums.items()},
                self._mismatch.sums(),
                maxima | {"sampling/logprob_diff_max": self._mismatch.largest()},
                dict(self._passes),
            ]
        )
        together = (_added, _added, _largest, _added)
        parts = zip(*everyone, strict=True)
        return tuple(pool(part) for pool, part in zip(together, parts, strict=True))

    def _kl(self, out: PolicyLossOutput, batch: PackedBatch) -> torch.Tensor:
        """From the reference model; without one, from the policy that the batch began with."""
        if "kl" in out.metrics:
            return out.metrics["kl"]
        if batch.old_logprobs is None:
            return out.loss.detach() * 0
        log_ratio = out.logprobs - batch.old_logprobs
        counts = token_counts(batch.cu_seqlens, batch.multiplicity, len(log_ratio))
        return ((torch.exp(-log_ratio) - 1 + log_ratio) * counts).sum() / counts.sum()

    def _raise(self, name: str, value: torch.Tensor) -> None:
        seen = self._maxima.get(name)
        self._maxima[name] = value if seen is None else torch.maximum(seen, value)


def _added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sums of figures by name; some parts may lack some names."""
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def _largest(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The largest figures by name; NaN wins, as in torch."""
    found: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            known = found.get(name, value)
            found[name] = value if math.isnan(value) or value > known else known
    return found
