"""Fused operators of group-relative policy optimisation.

Every operator has one contract and several implementations; `dispatch.choose` says which one runs
and why. Importing this package loads neither torch nor triton.

Layout, everywhere: N completion tokens, concatenated without padding; `cu_seqlens` int32 (B + 1)
marks where each of the B completions starts; H hidden size, V vocabulary size. Row i of `hidden`
(or `logits`) predicts `targets[i]`. Inputs are bf16, fp16 or fp32; results are fp32.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_PUBLIC = {
    "group_advantages": "group_advantages",
    "token_logprobs": "token_logprobs",
    "linear_logprobs": "linear_logprobs",
    "grpo_loss": "grpo_loss",
    "linear_grpo_loss": "linear_grpo_loss",
    "prefix_attention": "prefix_attention",
    "prefix_attention_blocks": "prefix_attention",
    "weight_sync": "weight_sync",
    "SegmentTable": "weight_sync",
    "flat_adamw": "flat_adamw",
    "grad_norm": "flat_adamw",
    "Segments": "flat_adamw",
    "policy_loss": "policy_loss",
    "importance_weights": "policy_loss",
    "PolicyLossSpec": "policy_loss",
    "PolicyLossOutput": "policy_loss",
    "verify_targets": "faults",
    "use": "dispatch",
}

__all__ = sorted(_PUBLIC)


class _Kernels(ModuleType):
    """An operator and the folder that holds it share one name; here the name means the operator."""

    def __getattr__(self, name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a submodule to its parent when it is first imported.
        if isinstance(value, ModuleType) and _PUBLIC.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return __all__


sys.modules[__name__].__class__ = _Kernels
