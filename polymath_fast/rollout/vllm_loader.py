"""A model loader for vLLM whose weights stay where a learner can read and store them.

All parameters of the engine become views of one buffer before anything is loaded, and every tensor
of the checkpoint is traced into it, so that nobody has to know how vLLM stacks an architecture.
CPU builds of vLLM repack weights after loading; here they pack a copy, again after every update.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from polymath_fast.errors import EngineError, UserError
from polymath_fast.learner.flat_storage import FlatStorage

LOAD_FORMAT = "polymath_fast"
_ALIGNMENT = 64  # elements: 128 bytes of bfloat16, where matrix units like a weight to start
_INSTEAD = "so they cannot be shared with the learner; --weight-sync reload works"


@dataclass
class LiveWeights:
    """The weights of an engine that others write; its model carries it as
    `polymath_fast_weights`."""

    storage: FlatStorage
    """places have the checkpoint's names"""
    updates: int = 0

    def changed(self) -> None:
        """Say that weights were written: what the engine derives from them is stale."""
        self.updates += 1


@register_model_loader(LOAD_FORMAT)
class LiveWeightsLoader(DefaultModelLoader):
    """Loads as vLLM does, into `LiveWeights`.

    Raises UserError for an engine whose weights are not plain tensors at fixed addresses.
    """

    def __init__(self, load_config: object):
        plain = copy.copy(load_config)
        plain.load_format = "auto"
        super().__init__(plain)
        self._trace: _Trace | None = None

    def load_model(self, vllm_config: object, model_config: object, prefix: str = "") -> nn.Module:
        refuse_what_moves_weights(vllm_config)
        model = super().load_model(vllm_config, model_config, prefix=prefix)
        weights = model.polymath_fast_weights
        live = weights.storage.live
        weights.storage = FlatStorage(live, _still_there(model, weights.storage))
        return model

    def load_weights(self, model: nn.Module, model_config: object) -> None:
        live = _gather(model)
        self._trace = _Trace(live)
        with self._trace:
            super().load_weights(model, model_config)
        weights = LiveWeights(FlatStorage(live, self._trace.places))
        self._trace = None
        model.polymath_fast_weights = weights
        _keep_as_loaded(model, weights)

    def get_all_weights(
        self, model_config: object, model: nn.Module
    ) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors, each announced to the trace before it is loaded."""
        for name, tensor in super().get_all_weights(model_config, model):
            if self._trace is not None:
                self._trace.expect(name, tensor)
            yield name, tensor


def refuse_what_moves_weights(vllm_config: object) -> None:
    """Raise UserError when an engine of these settings cannot hold weights that others write."""
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.world_size
    if model.quantization is not None:
        raise UserError(f"the engine's weights are quantised ({model.quantization}), {_INSTEAD}")
    if vllm_config.lora_config is not None:
        raise UserError(f"the engine wraps its weights for LoRA adapters, {_INSTEAD}")
    if model.enable_sleep_mode:
        raise UserError(
            "vLLM's sleep mode takes the memory of the weights away, which the learner uses too; "
            "leave out enable_sleep_mode"
        )
    if ranks != 1:
        raise UserError(f"{ranks} ranks split the engine's weights, {_INSTEAD}")


def _gather(model: nn.Module) -> Tensor:
    """Move all parameters into one new tensor, matrices first, each at an aligned offset.

    What belongs to no parameter is zero.
    """
    params = sorted(model.parameters(), key=lambda p: p.dim() < 2)  # a tied one comes once
    dtypes = sorted({str(p.dtype) for p in params})
    if len(dtypes) != 1:
        raise UserError(
            f"the engine's weights have several dtypes ({', '.join(dtypes)}), {_INSTEAD}"
        )
    offsets, end = [], 0
    for param in params:
        offsets.append(end)
        end += -(-param.numel() // _ALIGNMENT) * _ALIGNMENT
    live = torch.zeros(end, dtype=params[0].dtype, device=params[0].device)
    for param, offset in zip(params, offsets, strict=True):
        param.data = live[offset : offset + param.numel()].view(param.shape)
    return live


def _keep_as_loaded(model: nn.Module, weights: LiveWeights) -> None:
    """On a CPU put products that follow the weights in the place of vLLM's repacking; elsewhere
    `_still_there` looks whether it has left them where they are."""
    if weights.storage.live.device.type != "cpu":
        return

    def multiply_with_live_weight(layer: nn.Module) -> None:
        packs = ops._supports_onednn
        layer.cpu_linear = _PackedProduct(weights) if packs else torch.nn.functional.linear

    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
            method.process_weights_after_loading = multiply_with_live_weight


class _PackedProduct:
    """x @ weight.T (+ bias) on vLLM's CPU kernel, which wants its own layout of the weight.

    The packed copy is made when the first product after an update asks for it: it costs a fraction
    of one decode step, and products with it are up to twice as fast.
    """

    def __init__(self, weights: LiveWeights):
        self._weights = weights
        self._packed = None
        self._packed_at = -1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._packed_at != self._weights.updates:
            self._packed = None  # frees the old copy first
            self._packed = ops.create_onednn_mm(weight.t(), 32)
            self._packed_at = self._weights.updates
        return ops.onednn_mm(self._packed, x, bias)


def _still_there(model: nn.Module, storage: FlatStorage) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The places that the engine still samples from: a head that turned out to be tied is not one.

    Raises EngineError when vLLM put a parameter elsewhere.
    """
    start, size = storage.live.data_ptr(), storage.live.element_size()
    spans = []
    for name, param in model.named_parameters():
        first = (param.data_ptr() - start) // size
        if not 0 <= first <= storage.live.numel() - param.numel():
            raise EngineError(f"vLLM moved {name} after loading it, {_INSTEAD}")
        spans.append((first, first + param.numel()))
    return {
        name: place
        for name, place in storage.places.items()
        if any(first <= place[0] < last for first, last in spans)
    }


class _Trace(TorchDispatchMode):
    """Watches where in `live` the tensors of a checkpoint are copied to."""

    def __init__(self, live: Tensor):
        super().__init__()
        self._live = live
        self._expected: dict[str, Tensor] = {}
        self.places: dict[str, tuple[int, tuple[int, ...]]] = {}

    def expect(self, name: str, tensor: Tensor) -> None:
        """`tensor` is about to be loaded as `name`; it is held until then, and so its address."""
        self._expected[name] = tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self._note(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _note(self, target: Tensor, source: Tensor) -> None:
        offset = target.data_ptr() - self._live.data_ptr()
        if not 0 <= offset < self._live.nbytes or not target.is_contiguous():
            return
        for name, tensor in self._expected.items():
            if tensor.data_ptr() == source.data_ptr() and tensor.shape == target.shape:
                self.places[name] = (offset // target.element_size(), tuple(target.shape))
                del self._expected[name]
                return
