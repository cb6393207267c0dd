"""Which models the shared-prompt learner computes, by their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUPPORTED_FAMILIES = ("llama", "qwen2", "qwen3", "gemma")
_SIZES = (
    *("hidden_size", "intermediate_size", "vocab_size"),
    *("num_hidden_layers", "num_attention_heads"),
)


def check_shape(folder: Path, shape: Mapping[str, Any]) -> None:
    """Raises UserError unless `shape`, the keys of the folder's config.json, is that of a model of
    these families, before anything of it is loaded."""
    family = shape.get("model_type")
    if family not in SUPPORTED_FAMILIES:
        raise UserError(_unsupported(family))
    for name in _SIZES:
        value = shape.get(name)
        if type(value) is not int or value < 1:
            raise UserError(
                f"{folder / 'config.json'}: {name} is {value!r}; it must be a whole number from 1 "
                "on, as the model was saved with"
            )


def _unsupported(family: object) -> str:
    return (
        f"model family {family!r} is not supported by the shared-prompt learner; "
        f"use one of {', '.join(SUPPORTED_FAMILIES)}"
    )


def check_supported(config: PretrainedConfig) -> None:
    """Raises UserError, naming the families that are, and what else to change."""
    family = config.model_type
    if family not in SUPPORTED_FAMILIES:
        raise UserError(_unsupported(family))
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError(
            f"{family!r} with use_bidirectional_attention is no causal language model; set it to "
            "false in config.json"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "use_sliding_window", False) or kinds - {"full_attention"}:
        raise UserError(
            f"{family!r} with layers {sorted(kinds)} uses sliding-window attention, which the "
            "shared-prompt learner does not compute; set use_sliding_window to false in "
            "config.json if the context is shorter than the window"
        )
