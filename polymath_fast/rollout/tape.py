"""What the sampler's forward passes computed, kept until the learner has gone back through them.

A policy that samples and learns with the same weights computes every token of a completion twice:
once to draw the next one, once to differentiate. Here the first time is the only one. The sampler
writes what a backward pass needs straight to rows of the tape, token by token; a completion knows
its rows, see `Recorded`.

Legend: L layers, H hidden, Hq / Hkv query and key heads, D head size, I width of the MLP.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polymath_fast import memory
from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.kernels.cpu import tiles

_DEFAULT_GIB = 4.0  # but at most a quarter of the machine's memory
_IN_TILES = ("llama", "qwen2", "qwen3")  # models that decode in tiles


def tape_rows(
    shape: dict[str, Any], config: Config, *, engine: str, device: str, dtype: torch.dtype
) -> int:
    """How many tokens a run's tape has room for: those of all completions that a step may ask for,
    as far as `--tape-gib` reaches; 0 where nothing is recorded.

    `shape` holds the keys of the model's config.json, `engine` is "vllm" or "transformers".
    """
    if engine == "vllm" or device != "cpu" or not in_tiles(shape, dtype):
        return 0
    if config.updates_per_batch > 1 or config.beta:
        return 0
    gib = config.tape_gib
    if gib is None:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / memory.GIB
        gib = 0 if config.gradient_checkpointing else min(_DEFAULT_GIB, machine / 4)
    attempts = 1 + config.max_resamples * (config.on_saturation == "resample")
    completions = attempts * config.asked_generations * config.groups_per_step
    tokens = completions * (config.max_completion_length - 1)
    return min(tokens, int(gib * memory.GIB) // LayerSizes.of(shape, dtype).row_bytes)


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


class LayerSizes(NamedTuple):
    """The sizes of a decoder that its activations depend on."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    dtype: torch.dtype

    @classmethod
    def of(cls, shape: dict[str, Any], dtype: torch.dtype) -> LayerSizes:
        """From the keys of a model's config.json."""
        queries, keys, head = memory.widths(shape)
        heads = (queries // head, keys // head, head)
        layers, hidden = shape["num_hidden_layers"], shape["hidden_size"]
        return cls(layers, hidden, *heads, shape["intermediate_size"], dtype)

    @property
    def panels(self) -> int:
        """In which the MLP's gate and up are kept."""
        return -(-self.inner // tiles.COLUMNS)

    @property
    def row_bytes(self) -> int:
        """Of the tape's share of one token."""
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        layer = 2 * (self.hidden + self.panels * tiles.COLUMNS + queries + keys)
        log_sums = 4 * self.layers * self.heads
        return self.dtype.itemsize * (self.layers * layer + self.hidden) + log_sums


class Activations(NamedTuple):
    """What layers compute on rows of tokens; see `kernels.cpu.decode.step`."""

    hidden: Tensor
    """(L + 1, rows, H) the input of each layer, then what the last norm reads"""
    stacked: Tensor
    """(L, rows, Hq + 2 Hkv, D) queries, keys and values before norm and rotation"""
    attended: Tensor
    """(L, rows, Hq D)"""
    lse: Tensor
    """(L, rows, Hq) float32"""
    between: Tensor
    """(L, rows, H) after attention"""
    gate_up: Tensor
    """(L, panels, rows, 96), of each 48 columns those of the gate, then those of up"""

    @classmethod
    def empty(cls, sizes: LayerSizes, rows: int) -> Activations:
        """Uninitialised; memory counts from the first write to each row on."""

        def make(*shape: int, dtype: torch.dtype = sizes.dtype) -> Tensor:
            with torch.inference_mode(False):  # the sampler writes, the learner reads
                return torch.empty(shape, dtype=dtype)

        layers, heads = sizes.layers, sizes.heads
        return cls(
            make(layers + 1, rows, sizes.hidden),
            make(layers, rows, heads + 2 * sizes.key_heads, sizes.head_dim),
            make(layers, rows, heads * sizes.head_dim),
            make(layers, rows, heads, dtype=torch.float32),
            make(layers, rows, sizes.hidden),
            make(layers, sizes.panels, rows, 2 * tiles.COLUMNS),
        )


class Recorded(NamedTuple):
    """Where the forward pass of one completion lies."""

    activations: Activations
    rows: Tensor
    """(length - 1,) int64, of each token but the last one, which is never an input"""
    weight_version: int
    """of the weights that made it; others have no use for it"""


class Tape:
    """Room for `rows` tokens, which is allocated when the first wave begins."""

    def __init__(self, rows: int = 0):
        self.rows = rows
        self.used = 0
        self.activations: Activations | None = None
        self._on = False

    def start_step(self) -> None:
        """Forget everything; completions sampled from here on are recorded while there is room."""
        self.used, self._on = 0, True

    def end_step(self) -> None:
        """Record nothing until the next step."""
        self._on = False

    def claim(self, completions: int, tokens: int) -> Recorder:
        """For a wave of completions of at most so many tokens: the first ones that surely fit."""
        fitting = (self.rows - self.used) // max(1, tokens - 1) if self._on else 0
        return Recorder(self, min(completions, fitting), tokens)

    def open(self, sizes: LayerSizes) -> None:
        """Make room, if there is none yet. Raises UserError where the system has none."""
        if self.activations is not None:
            return
        try:
            self.activations = Activations.empty(sizes, self.rows)
        except RuntimeError as error:  # torch has no class of its own for it on a CPU
            gib = self.rows * sizes.row_bytes / memory.GIB
            raise UserError(
                f"the system has no {gib:.1f} GiB for the tape of {self.rows} tokens; go on with "
                f"--tape-gib {gib / 2:.1g}, or 0 for none"
            ) from error


class Recorder:
    """The rows of one wave of completions: the first `count` of them are recorded."""

    def __init__(self, tape: Tape, count: int, tokens: int):
        self.count = count
        self._tape = tape
        self._rows = torch.full((count, tokens), -1)

    def open(self, sizes: LayerSizes) -> Activations:
        """A decoder of these sizes is about to begin: where it writes."""
        if self.count:
            self._tape.open(sizes)
        return self._tape.activations or Activations.empty(sizes, 0)

    def begin(self, completions: Tensor, places: Tensor) -> tuple[int, int]:
        """How many of the next tokens (R,), at `places` of ascending `completions`, are recorded,
        which are the first of them, and the row of the tape for the first one."""
        tape, count = self._tape, int((completions < self.count).sum())
        if tape.used + count > tape.rows:
            self.count = count = 0
        first = tape.used
        tape.used += count
        rows = torch.arange(first, tape.used)
        self._rows[completions[:count], places[:count]] = rows
        return count, first

    def recorded(self, completion: int, length: int, weight_version: int) -> Recorded | None:
        """Of a completion of that many tokens; None unless all of its inputs were recorded."""
        if completion >= len(self._rows) or not length:
            return None
        rows = self._rows[completion, : length - 1]
        if self._tape.activations is None or bool((rows < 0).any()):
            return None
        return Recorded(self._tape.activations, rows.clone(), weight_version)
