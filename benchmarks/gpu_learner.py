"""Sections of the GPU suite: one update by the whole learner, beside others' passes.

The model is a random one of a true shape, made on the GPU. What an update takes is reported as the
share of the rate of plain bf16 products that 6 operations a parameter and completion token come to
(MFU); attention, the prompt and whatever is computed again count for nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import gpu_learner_rivals, gpu_sizes, gpu_timing
from benchmarks.gpu_learner_rivals import padded_logprobs
from benchmarks.gpu_sections import gate, rates
from polymath_fast.config import Config
from polymath_fast.kernels.policy_loss import policy_loss
from polymath_fast.learner import fused_layers
from polymath_fast.learner.loss import Divisors, loss_spec
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner
from polymath_fast.memory import parameters
from polymath_fast.models import random_models

LIMITS = {"loss": 1e-5, "logprobs": 5e-5, "gradient": 3e-5}
"""the first two absolute; the last of each parameter's norm; float32 products are three of TF32"""
NEGLIGIBLE = 2e-7
"""of the whole gradient's norm: what is exactly 0 in theory may be rounding as large as that"""


def settings(completions_at_once: int, shape: tuple[int, int, int]) -> Config:
    """Of an update on `shape`: tokens of the prompt, completions, tokens of the longest."""
    prompt, count, longest = shape
    return Config(
        num_generations=count,
        groups_per_step=1,
        max_completion_length=longest,
        tokens_per_microbatch=prompt + completions_at_once * longest,
    )


def random_rows(
    shape: tuple[int, int, int], vocab: int, *, ragged: bool = False
) -> list[TrainingRow]:
    """Completions of one prompt; with `ragged` from 1 token to the longest, the last one twice."""
    prompt, count, longest = shape
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(vocab, (length,), generator=draw).tolist()

    prompt_ids = tuple(ids(prompt))
    lengths = torch.linspace(1, longest, count).int().tolist() if ragged else count * [longest]
    rows = [
        TrainingRow(
            prompt_ids=prompt_ids,
            token_ids=ids(length),
            sampling_logprobs=length * [-math.log(vocab)],
            advantage=(1.0, -0.5)[i % 2],
        )
        for i, length in enumerate(lengths)
    ]
    return rows + rows[-1:] if ragged else rows


def correct_learner(device: str = "cuda") -> dict[str, Any]:
    """Loss, log-probs and each parameter's gradient of `Learner` against the padded pass, float32.

    In one micro-batch, and in several, for which the prompt is computed apart.
    """
    sizes = gpu_sizes.SIZES
    plain = random_models.in_memory(sizes.checked_learner_model, "float32", device).eval()
    # whose products are float32 to the last one
    plain.set_attn_implementation("eager")
    rows = random_rows(sizes.checked_update, plain.config.vocab_size, ragged=True)
    logprobs, loss = _plain_update(plain, rows, _corrected(1))
    truth = {name: weight.grad for name, weight in plain.named_parameters()}
    values: dict[str, float] = {}
    for name, at_once in (("whole", len(rows)), ("in parts", 1)):
        model = random_models.in_memory(sizes.checked_learner_model, "float32", device)
        learner = Learner(Policy.of(model), _corrected(at_once))
        filled = learner.passes.with_logprobs(rows, "old_logprobs")
        found = torch.tensor([x for row in filled for x in row.old_logprobs])
        grads, metrics = _our_update(learner, rows)
        values |= {
            f"{name}, loss error": abs(metrics["policy/loss"] - loss),
            f"{name}, logprobs error": float((found - logprobs.cpu()).abs().max()),
            f"{name}, gradient error": _worst(grads, truth),
        }
    return gate(values, lambda name: LIMITS[name.split()[-2]])


def _corrected(completions_at_once: int) -> Config:
    """With a correction to the sampler; without one the loss on policy is the same for all."""
    config = settings(completions_at_once, gpu_sizes.SIZES.checked_update)
    return replace(config, importance_sampling_mode="token_truncate")


def _plain_update(
    model: PreTrainedModel, rows: Sequence[TrainingRow], config: Config
) -> tuple[Tensor, float]:
    """(N,) log-probs and the loss of all rows, padded; gradients are left on the parameters."""
    logprobs = padded_logprobs(model, rows)
    flat = partial(torch.tensor, device=model.device)
    lengths = flat([0, *(len(row.token_ids) for row in rows)])
    out = policy_loss(
        logprobs,
        flat([row.advantage for row in rows]),
        lengths.cumsum(0).int(),
        sampling_logprobs=flat([x for row in rows for x in row.sampling_logprobs]),
        spec=loss_spec(config, Divisors(int(lengths.sum()), len(rows))),
    )
    out.loss.backward()
    return logprobs.detach(), float(out.loss.detach())


def _our_update(
    learner: Learner, rows: Sequence[TrainingRow]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients by name, as the optimizer would see them, and the update's metrics."""
    step, kept = learner.optimizer.step, []

    def keep(rate: float) -> tuple[Tensor, Tensor]:
        kept.append(learner.optimizer.grad.clone())
        return step(rate)

    with mock.patch.object(learner.optimizer, "step", keep):
        metrics = learner.update(rows, 0)
    (grad,) = kept
    spans = learner.optimizer.storage.spans()
    return {name: grad[start:stop] for name, (start, stop) in spans.items()}, metrics


def _worst(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest error of a parameter's gradient, relative to its norm."""
    assert found.keys() == truth.keys()
    whole = torch.stack([grad.norm() for grad in truth.values()]).norm()
    errors = []
    for name, grad in truth.items():
        error = (found[name] - grad.reshape(-1)).norm()
        floor = whole * NEGLIGIBLE / LIMITS["gradient"]
        errors.append(error / torch.maximum(grad.norm(), floor))
    return float(torch.stack(errors).max())


def time_learner() -> dict[str, Any]:
    """One update on 512 completions of 1,024 tokens; on fewer with transformers' decoder layers in
    place of fused ones; and others' passes of 16 of them, no update.

    Each once, after a micro-batch that compiles what is to be compiled: each takes seconds, and
    repeats itself inside. One after the other: two models with gradients do not fit.
    """
    sizes = gpu_sizes.SIZES
    shape = random_models.FAMILIES[sizes.learner_model]
    rows = random_rows(sizes.update, shape["vocab_size"])
    some, few = rows[: sizes.unfused_completions], rows[: sizes.rival_completions]
    table: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for name, what, make, which in (
        ("", "ours, one update", _ours, rows),
        ("layers not fused", f"ours, layers not fused, {len(some)} completions", _unfused, some),
        *((n, f"{n}, padded, {len(few)} completions", make, few) for n, make in _rivals().items()),
    ):
        table.append(_row(what, partial(make, which), shape, which))
        ours, other = (row.get("us a token") for row in (table[0], table[-1]))
        if name and ours and other:
            ratios[f"{name} / ours, a token"] = other / ours
        gpu_timing.keep({"rows": table, "values": ratios})
    return {"rows": table, "values": ratios}


def _rivals() -> dict[str, Callable[[Sequence[TrainingRow]], Callable[[], object]]]:
    """By name; a library that is not installed is left out."""
    rivals = {"transformers": gpu_learner_rivals.padded}
    if find_spec("trl"):
        rivals["trl"] = gpu_learner_rivals.trl
        if find_spec("liger_kernel"):
            rivals["trl with liger's layers"] = partial(gpu_learner_rivals.trl, liger=True)
    return rivals


def _row(
    what: str,
    make: Callable[[], Callable[[], object]],
    shape: dict[str, Any],
    rows: Sequence[TrainingRow],
) -> dict[str, Any]:
    rate = 1e12 * rates()["values"]["bf16 TFLOP/s"]
    timing = gpu_timing.once(make)
    row = {"what": what} | timing.row()
    if timing.median is None:
        return row
    tokens = sum(len(row.token_ids) for row in rows)
    # a tied head counts once: looking embeddings up is no product
    flops = 6 * parameters(shape) * tokens
    share = 1e3 * flops / rate / timing.median
    return row | {"flops": flops, "share": share, "us a token": 1e3 * timing.median / tokens}


def _unfused(rows: Sequence[TrainingRow]) -> Callable[[], object]:
    """As `_ours`; autograd keeps twice as much of a token."""
    with mock.patch.object(fused_layers, "fuse", lambda model, attention: "not asked for"):
        return _ours(rows, gpu_sizes.SIZES.completions_at_once // 2)


def _ours(rows: Sequence[TrainingRow], at_once: int | None = None) -> Callable[[], object]:
    """An update, warmed up and sure to end in time.

    Raises:
        TimeoutError: it would take longer than the section has.
    """
    sizes = gpu_sizes.SIZES
    at_once = at_once or sizes.completions_at_once
    policy = Policy.of(random_models.in_memory(sizes.learner_model, "bfloat16", "cuda"))
    learner = Learner(policy, settings(at_once, sizes.update))
    # more than fit at once: the prompt is computed apart, as it will be
    some = rows[: at_once + 1]
    for _ in range(2):
        start = time.monotonic()
        # its metrics wait for the device
        learner.update(some, 0)
        now = time.monotonic()
    expected = (now - start) * len(rows) / len(some)
    if now + expected > gpu_timing.deadline + gpu_timing.GRACE:
        raise TimeoutError(f"not begun: an update would take {expected:.0f} s")
    return lambda: learner.update(rows, 0)
