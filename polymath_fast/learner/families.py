"""Which models the shared-prompt learner computes, by their configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polymath_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUPPORTED_FAMILIES = ("llama", "qwen2", "qwen3", "gemma")


def check_supported(config: PretrainedConfig) -> None:
    """Raises UserError, naming the families that are, and what else to change."""
    family = config.model_type
    if family not in SUPPORTED_FAMILIES:
        raise UserError(
            f"model family {family!r} is not supported by the shared-prompt learner; "
            f"use one of {', '.join(SUPPORTED_FAMILIES)}"
        )
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
