"""How much of a run the sampler's tape has room for, see `rollout.tape`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from polymath_fast import machine, memory
from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.kernels.cpu import tiles
from polymath_fast.kernels.cpu.head import odd_lines
from polymath_fast.precision import torch_dtype

_DEFAULT_SHARE = 0.6  # of what the rest of a run leaves of the machine's memory
_IN_TILES = ("llama", "qwen2", "qwen3")  # models that decode in tiles


def tape_rows(
    shape: dict[str, Any],
    config: Config,
    *,
    engine: str,
    prompt_tokens: int,
    device: str,
    dtype: str,
) -> int:
    """How many tokens the tape of each process of a run has room for: those of all completions that
    a step may ask of it, as far as `--tape-gib` reaches; 0 where nothing is recorded.

    The arguments are those of `memory.estimate`.
    """
    kind, whole = torch_dtype(dtype), config
    config = config.of_one_process()
    if engine == "vllm" or device != "cpu" or not in_tiles(shape, kind):
        return 0
    if config.updates_per_batch > 1 or config.beta:
        return 0
    gib = config.tape_gib
    if gib is None and config.gradient_checkpointing:
        gib = 0
    if gib is None:
        rest = memory.estimate(
            shape,
            replace(whole, tape_gib=0),
            engine=engine,
            prompt_tokens=prompt_tokens,
            device=device,
            dtype=dtype,
        )
        left = machine.memory_bytes() / whole.num_processes / memory.GIB - sum(rest.values())
        gib = max(0, _DEFAULT_SHARE * left)
    attempts = 1 + config.max_resamples * (config.on_saturation == "resample")
    completions = attempts * config.asked_generations * config.groups_per_step
    tokens = completions * config.max_completion_length
    return min(tokens, int(gib * memory.GIB) // row_bytes(shape, config, kind))


def row_bytes(shape: dict[str, Any], config: Config, dtype: torch.dtype) -> int:
    """Of a run's tape for each token; `shape` holds the keys of the model's config.json."""
    sizes = DecoderSizes.of(shape, dtype)
    return sizes.layer_bytes + (sizes.head_bytes if keeps_predictions(config) else 0)


def keeps_predictions(config: Config) -> bool:
    """Whether the tape is to hold softmaxes, too: the gradient of an entropy bonus needs logits."""
    return not config.entropy_coef


def in_tiles(shape: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether the embedded sampler decodes such a model in tiles on this machine, as far as its
    config.json tells; see `tile_weights.fits`."""
    *_, head = memory.widths(shape)
    even = shape["hidden_size"] % 2 == shape["intermediate_size"] % 2 == 0
    fitting = head % tiles.LANES == 0 and (even or dtype == torch.float32)
    return shape["model_type"] in _IN_TILES and fitting and tiles.available(dtype)


def require_tape(
    tape_gib: float, engine: str, device: str, shape: dict[str, Any], dtype: torch.dtype
) -> None:
    """Raise UserError where `--tape-gib` finds no sampler that fills a tape.

    `shape` holds the keys of the model's config.json.
    """
    if engine == "vllm":
        raise UserError(
            f"--tape-gib {tape_gib:g} is for the embedded sampler; vLLM keeps nothing of its "
            "forward passes: leave it out, or take --engine transformers"
        )
    if device != "cpu":
        raise UserError(
            f"--tape-gib {tape_gib:g}: the embedded sampler fills a tape on a CPU only, and this "
            f"run is on {device}; leave it out, or take --device cpu"
        )
    if not in_tiles(shape, dtype):
        raise UserError(
            f"--tape-gib {tape_gib:g}: this processor does not decode {shape['model_type']} models "
            f"of this shape in tiles, in {dtype}, and nothing else fills a tape; leave it out"
        )


class DecoderSizes(NamedTuple):
    """The sizes of a decoder that what it computes of a token depends on."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    vocab: int
    dtype: torch.dtype

    @classmethod
    def of(cls, shape: dict[str, Any], dtype: torch.dtype) -> DecoderSizes:
        """From the keys of a model's config.json."""
        queries, keys, head = memory.widths(shape)
        heads = (queries // head, keys // head, head)
        layers, hidden = shape["num_hidden_layers"], shape["hidden_size"]
        inner, vocab = shape["intermediate_size"], shape["vocab_size"]
        return cls(layers, hidden, *heads, inner, vocab, dtype)

    @property
    def panels(self) -> int:
        """In which the MLP's gate and up are kept."""
        return -(-self.inner // tiles.COLUMNS)

    @property
    def vocab_width(self) -> int:
        """Columns of a row of predictions."""
        return odd_lines(self.vocab, self.dtype.itemsize)

    @property
    def head_bytes(self) -> int:
        """What the LM head makes of one token."""
        return self.dtype.itemsize * self.vocab_width

    @property
    def layer_bytes(self) -> int:
        """What the layers compute of one token."""
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        layer = 2 * (self.hidden + self.panels * tiles.COLUMNS + queries + keys)
        log_sums = 4 * self.layers * self.heads
        return self.dtype.itemsize * (self.layers * layer + self.hidden) + log_sums
