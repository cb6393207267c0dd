"""A backend for vLLM's weight-transfer API whose learner lives in the engine's process.

    from polymath_fast.rollout import vllm_transfer
    vllm_transfer.register()
    llm = LLM(..., load_format="polymath_fast",
              weight_transfer_config=WeightTransferConfig(backend="polymath_fast"))
    llm.init_weight_transfer_engine({"init_info": {}})
    llm.start_weight_update()
    llm.update_weights({"update_info": {"named_weights": model.named_parameters()}})
    llm.finish_weight_update()
    llm.reset_prefix_cache()

A tensor that lies in the engine's memory already (see `rollout.weights.bind`) is not copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import base, factory

from polymath_fast.errors import EngineError, UserError
from polymath_fast.rollout.vllm_loader import LOAD_FORMAT as BACKEND


@dataclass
class InitInfo(base.WeightTransferInitInfo):
    """There is no connection to make."""


@dataclass
class UpdateInfo(base.WeightTransferUpdateInfo):
    """Part of an update."""

    named_weights: Iterable[tuple[str, Tensor]]
    """Hugging Face names; tensors of the engine's dtype or a wider one, on any device"""


class InProcessWeightTransfer(base.WeightTransferEngine[InitInfo, UpdateInfo]):
    """Writes each tensor to its place in the engine's own memory.

    Raises UserError for an engine of another load format and for tensors that do not fit,
    EngineError for an update that left some out.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._live = getattr(self.model, "polymath_fast_weights", None)
        if self._live is None:
            raise UserError(
                f"the weight-transfer backend {BACKEND!r} needs the weights where it can write "
                f"them: start vLLM with load_format={BACKEND!r}"
            )
        self._views = self._live.storage.views()
        self._missing: set[str] = set()

    def start_weight_update(self) -> None:
        self._missing = set(self._views)

    @torch.no_grad()
    def receive_weights(self, update_info: UpdateInfo) -> None:
        for name, tensor in update_info.named_weights:
            view = self._views.get(name)
            if view is None:
                # a tied head, which its embedding brings; or nothing of this model
                if name.endswith("lm_head.weight"):
                    continue
                raise UserError(f"this engine has no tensor {name}, e.g. it has {min(self._views)}")
            if tensor.shape != view.shape:
                raise UserError(
                    f"{name} is {tuple(tensor.shape)}, but {tuple(view.shape)} in the engine"
                )
            if tensor.data_ptr() != view.data_ptr():
                view.copy_(tensor)
            self._missing.discard(name)

    def finish_weight_update(self) -> None:
        self._live.changed()
        missing, self._missing = self._missing, set()
        if missing:
            raise EngineError(
                f"{len(missing)} of {len(self._views)} tensors were not in the update, the first "
                f"is {min(missing)}: old and new weights are mixed"
            )

    def shutdown(self) -> None:
        """Nothing is held."""


def register() -> None:
    """Make the backend known to vLLM, once. Raises UserError where vLLM's API is an older one."""
    if not hasattr(base.WeightTransferEngine, "start_weight_update"):
        raise UserError(
            "this vLLM has no start_weight_update for weight-transfer backends; 0.32 has it, and "
            "--weight-sync alias and reload work without"
        )
    if BACKEND not in factory.WeightTransferEngineFactory._registry:
        factory.WeightTransferEngineFactory.register_engine(BACKEND, InProcessWeightTransfer)
