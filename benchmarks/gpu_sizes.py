"""How large the GPU suite's inputs are, in one place, so that a rehearsal can make them small."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sizes:
    """The suite's own: real models' shapes, for a GPU of 78 GiB or more."""

    side: int = 8192
    """of the square matrix product that rates are measured with"""
    copied: int = 2**31
    """bytes of the copy that rates are measured with"""
    flush: int = 2**28
    """bytes written before each timed call: more than any L2 cache holds"""
    repeats: int | None = None
    """of every timed variant; None: what each section asks for"""
    warmups: int = 2
    """calls of a variant before any is timed"""

    small_head: tuple[int, int] = (1536, 151_936)
    large_head: tuple[int, int] = (3584, 152_064)
    """H and V of Qwen2.5-1.5B and 7B"""
    length: int = 512
    """tokens a completion"""
    rows: int = 8192
    """N beside everybody"""
    many_rows: int = 65_536
    """N beside who can"""
    checked_rows: int = 512
    """N of the checks that hold float64 logits"""
    checked_head_rows: int = 2048
    vocabs: tuple[int, ...] = (151_936, 49_152)
    """of the losses from logits"""

    attention_heads: tuple[int, int] = (12, 2)
    head_size: int = 128
    layer_width: int = 8960
    """of the MLP, all of Qwen2.5-1.5B"""
    attention: dict[str, tuple[int, int, int]] = field(
        default_factory=lambda: {
            "P=512 B=64 R=1024": (512, 64, 1024),
            "P=4096 B=64 R=512": (4096, 64, 512),
        }
    )
    """prompt, completions, their longest"""

    weights: int = 2**28
    """that an update is timed with"""
    checked_gradient: int = 2**20 + 13
    completions: int = 2048
    group: int = 128

    checked_learner_model: str = "tiny-qwen2"
    checked_update: tuple[int, int, int] = (150, 24, 200)
    """prompt, completions, their longest"""
    learner_model: str = "qwen2.5-1.5b"
    update: tuple[int, int, int] = (150, 512, 1024)
    """likewise"""
    completions_at_once: int = 24
    """of a micro-batch, without gradient checkpointing. For each of the 1.54e9 parameters 18 bytes
    (bf16 weight, fp32 master, gradient and two moments): 27.8e9; for each of 24 x 1,024 + 150
    tokens 1.39e6 bytes of activations: 34.3e9; 2e9 of the LM head: 64e9 bytes, 60 GiB"""
    unfused_completions: int = 96
    rival_completions: int = 16
    rival_completions_at_once: int = 8
    """8 x 1,174 tokens: 27.3e9 bytes of activations, 6.2e9 of bf16 weights and gradients, and of
    the logits two bf16 and four fp32 copies, 25.6e9: 59.1e9 bytes, 55 GiB. TRL's head has a tile of
    4,096 x 32,768 logits, 0.3e9, and its weight's gradient in fp32 and bf16, 1.4e9: 33 GiB"""

    checked_model: str = "qwen2.5-0.5b"
    small_model: str = "qwen2.5-1.5b"
    large_model: str = "qwen2.5-7b"
    vllm_model: str = "embedded:smollm2"
    vllm_large_model: str = "random:qwen2.5-1.5b"


SIZES = Sizes()
