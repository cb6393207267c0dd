"""All weights of a model to a sampler's layout: learner's flat memory, engine's stacked tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.timing import Variants
from polymath_fast.kernels import SegmentTable, weight_sync
from polymath_fast.models.random_models import FAMILIES
from polymath_fast.precision import choose_dtype, torch_dtype

Pairs = list[tuple[Tensor, Tensor]]
T = TypeVar("T")
BUCKET = 1 << 30
"""bytes"""
_STACKED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}
"""what vLLM keeps as rows of one tensor; everything else is a tensor of its own"""


def weight_sync_case(device: str) -> Case:
    """From the learner's dtype to the same: what an update of its live weights needs."""
    dtype = torch_dtype(choose_dtype("auto", device)[0])
    return _case(device, dtype, dtype)


def weight_sync_fp32_case(device: str) -> Case:
    """fp32 to bf16: straight from the optimizer's master weights."""
    return _case(device, torch.float32, torch.bfloat16)


def tensors(
    family: str, dtype: torch.dtype, device: str, into: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Tensor], Pairs]:
    """Random weights by Hugging Face name, and each with the view of `into` it is copied to."""
    shapes = _shapes(FAMILIES[family])
    flat = torch.randn(sum(s.numel() for s in shapes.values()), device=device, dtype=dtype)
    sources, groups, offset = {}, {}, 0
    for name, shape in shapes.items():
        sources[name] = flat[offset : offset + shape.numel()].view(shape)
        offset += shape.numel()
        layer, _, last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
        kind = name.rsplit(".", 1)[1]
        groups.setdefault(f"{layer}.{_STACKED.get(last, last)}.{kind}", []).append(sources[name])
    pairs = []
    for members in groups.values():
        rows = [len(m) for m in members]
        target = torch.zeros(sum(rows), *members[0].shape[1:], dtype=into, device=device)
        pairs += zip(members, target.split(rows), strict=True)
    return sources, pairs


def loop(pairs: Pairs) -> Callable[[], None]:
    """One `copy_` a tensor, as loaders of weights do."""

    def run() -> None:
        for source, target in pairs:
            target.copy_(source)

    return run


def buckets(pairs: Pairs, most: int = BUCKET) -> Callable[[], None]:
    """Packed into buffers of at most `most` bytes each, sent as one, unpacked again, as trainers do
    whose sampler is another process; a larger tensor has a buffer of its own."""
    parts = parts_of(pairs, lambda pair: pair[0].nbytes, most)

    def run() -> None:
        for part in parts:
            packed = torch.cat([source.reshape(-1) for source, _ in part])
            values = packed.split([target.numel() for _, target in part])
            for (_, target), value in zip(part, values, strict=True):
                target.copy_(value.view(target.shape))

    return run


def parts_of(items: Sequence[T], size: Callable[[T], int], most: int = BUCKET) -> list[list[T]]:
    """`items` in their order, in parts of at most `most` bytes; a larger one is a part."""
    parts: list[list[T]] = [[]]
    for item in items:
        if parts[-1] and sum(map(size, parts[-1])) + size(item) > most:
            parts.append([])
        parts[-1].append(item)
    return parts


def contiguous(table: SegmentTable) -> Callable[[], None]:
    """As many bytes as one plain copy: the machine's rate."""
    first = table.segments[0].src
    options = {"dtype": torch.uint8, "device": first.device}
    source, target = (torch.ones(table.bytes // 2, **options) for _ in range(2))
    return lambda: target.copy_(source)


def wrong_tensors(pairs: Pairs) -> float:
    """How many targets are not their source in the target's dtype, bit for bit."""
    return float(sum(not torch.equal(t, s.to(t.dtype)) for s, t in pairs))


def _case(device: str, dtype: torch.dtype, into: torch.dtype) -> Case:
    torch.manual_seed(0)
    family = "qwen2.5-1.5b" if device == "cuda" else "smollm2-135m"
    sources, pairs = tensors(family, dtype, device, into)
    table = SegmentTable(*(list(side) for side in zip(*pairs, strict=True)))
    variants: Variants = {
        "ours": lambda: weight_sync(table),
        "loop of copy_": loop(pairs),
        "buckets": buckets(pairs),
        "one copy of as many bytes": contiguous(table),
    }
    if device == "cpu" and dtype == into and find_spec("vllm"):
        variants["vLLM's reload_weights"] = _Reload(family, sources)

    def check() -> dict[str, float]:
        weight_sync(table)
        wrong = wrong_tensors(pairs)
        assert wrong == 0, f"{wrong:.0f} tensors are not what they should be; nothing was timed"
        return {"wrong tensors": wrong}

    return Case(
        shape={"tensors": len(pairs), "segments": len(table.segments), "elements": table.elements},
        variants=variants,
        baseline="one copy of as many bytes",
        check=check,
        bytes=float(table.bytes),
    )


class _Reload:
    """vLLM's own reload of the same tensors; the first call starts the engine."""

    def __init__(self, family: str, sources: dict[str, Tensor]) -> None:
        self._family = family
        self._sources = sources
        self._engine: Any = None

    def __call__(self) -> None:
        if self._engine is None:
            self._engine = self._start()
        self._engine.weights.push(self._sources.items(), self._engine.weights.version + 1)

    def _start(self) -> Any:
        from polymath_fast import environment
        from polymath_fast.models import resolve_model
        from polymath_fast.rollout.vllm_engine import VllmEngine

        environment.prepare()
        folder = resolve_model(f"random:{self._family}", notify=print)
        sizes = {"max_model_len": 64, "max_num_seqs": 4, "kv_cache_gib": 1}
        return VllmEngine(folder, stop_token_ids=[0], device="cpu", **sizes)


def _shapes(shape: dict[str, Any]) -> dict[str, torch.Size]:
    """Hugging Face name -> shape, in the order of transformers' parameters; a tied head once."""
    from transformers import AutoModelForCausalLM

    from polymath_fast.models.random_models import config_of

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    return {name: parameter.shape for name, parameter in model.named_parameters()}
