"""Weight sync by one copy into the parameters of a vLLM engine in this process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from polymath_fast.errors import EngineError, UserError
from polymath_fast.kernels import SegmentTable, weight_sync
from polymath_fast.rollout.segments import WeightPlan, record
from polymath_fast.rollout.vllm_sync import failures_named, forget_prefixes
from polymath_fast.rollout.weights import compare

_INSTEAD = "so weights cannot be copied into it; --weight-sync reload works"
_PLAIN = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
"""what vLLM calls layers that multiply with a parameter exactly as it was loaded"""

Address = tuple[str, int, torch.dtype, tuple[int, ...], tuple[int, ...]]


class Changeable(Protocol):
    """Weights from which something else is derived."""

    def changed(self) -> None:
        """They are other weights now."""


class CopySync:
    """The learner's weights, in bf16 or fp32, are copied to where the engine reads its own.

    What goes where is recorded from the model's own loader at the first push. On a GPU a push is
    one launch and no wait: it is ordered after the learner's work and before the engine's.
    """

    name = "copy"

    def __init__(self, llm: object, weights: Changeable | None = None) -> None:
        """Meet the engine.

        Args:
            llm: a vllm.LLM whose layers keep their weights as loaded.
            weights: what to tell that weights have changed, where the engine derives something
                from them (CPU builds pack a copy for their products).

        Raises:
            UserError: the engine's weights are not plain tensors in one process.
        """
        self._llm = llm
        self._weights = weights
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self._model: nn.Module = runner.get_model()
        refuse(llm.llm_engine.vllm_config, self._model)
        self._targets = {n: p.data for n, p in self._model.named_parameters()}
        device = next(iter(self._targets.values())).device
        # vLLM gives the thread that starts it a stream of its own, and runs on that one.
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._plan: WeightPlan | None = None
        self._table: SegmentTable | None = None
        self._addresses: list[Address] = []
        self.version = 0

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy `named_weights` (Hugging Face names) and forget the old ones' prefix cache.

        Raises:
            UserError: a tensor has no place in the engine, or the other way round.
            EngineError: the engine replaced its parameters, or still works on requests; the device
                failed.
        """
        sources = {name: tensor.detach() for name, tensor in named_weights}
        table = self._current_table(sources)
        with failures_named():
            self._copy(table)
        if self._weights is not None:
            self._weights.changed()
        forget_prefixes(self._llm)
        self.version = version

    def _copy(self, table: SegmentTable) -> None:
        if self._stream is None:
            weight_sync(table)
            return
        learner = torch.cuda.current_stream(self._stream.device)
        learner.wait_stream(self._stream)
        weight_sync(table)
        self._stream.wait_stream(learner)

    def attach(self, model: nn.Module) -> None:
        """The learner keeps memory of its own."""

    def verify(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Compare checksums of every part that a push copies, in the engine's dtype."""
        sources = {name: tensor.detach() for name, tensor in named_weights}
        self._current_table(sources)
        ours, theirs = {}, {}
        for source, target in self._plan.moves:
            label = f"{source.name} (in {target.name})"
            theirs[label] = target.of(self._targets[target.name])
            ours[label] = source.of(sources[source.name]).to(theirs[label].dtype)
        compare(ours.items(), theirs)

    def _current_table(self, sources: Mapping[str, Tensor]) -> SegmentTable:
        """The table for these addresses; made again when the learner's tensors have moved."""
        addresses = [
            (name, t.data_ptr(), t.dtype, tuple(t.shape), t.stride()) for name, t in sources.items()
        ]
        for name, parameter in self._model.named_parameters():
            if parameter.data_ptr() != self._targets[name].data_ptr():
                raise EngineError(f"vLLM moved {name}, {_INSTEAD}")
        if self._plan is None or [a[3:] for a in addresses] != [a[3:] for a in self._addresses]:
            self._plan = record(self._model.load_weights, sources, self._targets)
            self._table = None
        if self._table is None or addresses != self._addresses:
            self._table = self._plan.table(sources, self._targets)
            self._addresses = addresses
        return self._table


def refuse(vllm_config: object, model: nn.Module) -> None:
    """Raise UserError when a copy into the parameters of `model` would not change what it does."""
    settings, parallel = vllm_config.model_config, vllm_config.parallel_config
    if settings.quantization is not None:
        raise UserError(f"the engine's weights are quantised ({settings.quantization}), {_INSTEAD}")
    if vllm_config.lora_config is not None:
        raise UserError(f"the engine wraps its weights for LoRA adapters, {_INSTEAD}")
    if parallel.world_size != 1:
        raise UserError(f"{parallel.world_size} processes hold the engine's weights, {_INSTEAD}")
    if settings.use_mla:
        raise UserError(f"the engine's attention (MLA) uses products of its weights, {_INSTEAD}")
    for name, layer in model.named_modules():
        method = type(getattr(layer, "quant_method", None)).__name__
        if method not in (*_PLAIN, "NoneType"):
            raise UserError(f"the engine's {name} rearranges its weights ({method}), {_INSTEAD}")
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            raise UserError(f"the engine keeps a repacked {name} and not the tensor, {_INSTEAD}")
