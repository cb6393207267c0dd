"""The case of layer_rows for `registry`: a decoder layer's row passes, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_sizes
from benchmarks.case import Case, relative_error
from benchmarks.timing import Variants, late
from polymath_fast.kernels import layer_rows
from polymath_fast.precision import default_dtype

EPS = 1e-6
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
"""relative to a result's norm; rounding to bf16 makes 1.7e-3"""


@dataclass
class Rows:
    """What a layer's passes read: N rows, as products and attention leave them."""

    x: Tensor  # (N, H)
    weight: Tensor  # (H,)
    stacked: Tensor  # (N, Hq + 2 Hkv, D)
    cos: Tensor  # (N, D)
    sin: Tensor  # (N, D)
    gate_up: Tensor  # (N, 2 I)
    d_normed: Tensor  # (N, H)
    d_heads: tuple[Tensor, Tensor, Tensor]  # (N, Hq, D), (N, Hkv, D) twice
    d_active: Tensor  # (N, I)

    @property
    def counts(self) -> tuple[int, int]:
        """Hq and Hkv."""
        return self.d_heads[0].shape[1], self.d_heads[1].shape[1]


def layer_rows_case(device: str) -> Case:
    """N = 8192 rows of Qwen2.5-1.5B on a GPU, 4096 of SmolLM2-135M on a CPU."""
    rows = random_rows(device)
    passes: Variants = {"ours": lambda: ours(rows), **rivals(rows)}
    return Case(
        shape={"N": len(rows.x), "H": rows.x.shape[1], "I": rows.d_active.shape[1]},
        variants=passes,
        baseline="torch.compile",
        check=lambda: check_passes(device),
        bytes=float(needed_bytes(rows)),
    )


def random_rows(device: str, count: int | None = None) -> Rows:
    """As many rows; left out, as many as are timed."""
    sizes = gpu_sizes.SIZES
    if device == "cuda":
        widths = (sizes.small_head[0], sizes.layer_width, *sizes.attention_heads, sizes.head_size)
        count = count or sizes.rows
    else:
        widths, count = (576, 1536, 9, 3, 64), count or 4096
    hidden, inner, queries, keys, size = widths
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, device=device, generator=generator)
        return drawn.to(default_dtype(device))

    angle = draw(count, size // 2).repeat(1, 2)
    return Rows(
        *(draw(count, hidden), draw(hidden), draw(count, queries + 2 * keys, size)),
        *(angle.cos(), angle.sin(), draw(count, 2 * inner), draw(count, hidden)),
        tuple(draw(count, heads, size) for heads in (queries, keys, keys)),
        draw(count, inner),
    )


def needed_bytes(rows: Rows) -> int:
    """Each pass reads its inputs and writes its results once; see `layer_rows._triton`."""
    turning = rows.d_heads[0].nbytes + rows.d_heads[1].nbytes
    norm, swiglu = 2 * rows.x.nbytes, 3 * rows.d_active.nbytes
    return norm + 2 * turning + swiglu + 3 * rows.x.nbytes + 2 * rows.stacked.nbytes + 2 * swiglu


def ours(rows: Rows) -> tuple[Tensor, ...]:
    """Results and gradients; the passes overwrite `stacked` and `d_active`, as the learner's do."""
    x, weight, none = rows.x, rows.weight, (None, None)
    angle = (rows.counts, rows.cos, rows.sin, none, EPS)
    normed = layer_rows.rms_norm(x, weight, EPS, torch.empty_like(x))
    rotated = layer_rows.rotate(rows.stacked, *angle, rows.stacked)
    active = layer_rows.swiglu(rows.gate_up, torch.empty_like(rows.d_active))
    d_x, d_weight = layer_rows.rms_norm_gradient(x, weight, EPS, rows.d_normed)
    d_stacked, d_gate_up = torch.empty_like(rows.stacked), torch.empty_like(rows.gate_up)
    layer_rows.rotate_gradient(None, *angle, rows.d_heads, d_stacked)
    layer_rows.swiglu_gradient(rows.gate_up, rows.d_active, d_gate_up)
    return normed, rotated, active, d_x, d_weight, d_stacked, d_gate_up


def rivals(rows: Rows) -> Variants:
    """The same by others; a library that is not installed is left out."""
    compiled = torch.compile(_eager_layer, dynamic=False)
    variants: Variants = {
        "torch.compile": lambda: differentiated(rows, compiled),
        "eager": lambda: differentiated(rows, _eager_layer),
    }
    if rows.x.is_cuda and find_spec("liger_kernel"):
        variants["liger"] = late(lambda: _liger(rows))
    return variants


def differentiated(rows: Rows, layer: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What `ours` returns, of a `layer` that autograd differentiates."""
    leaves = [
        t.detach().requires_grad_() for t in (rows.x, rows.weight, rows.stacked, rows.gate_up)
    ]
    normed, q, k, v, active = layer(*leaves, rows.counts, rows.cos, rows.sin)
    upstream = (rows.d_normed, *rows.d_heads, rows.d_active)
    gradients = torch.autograd.grad((normed, q, k, v, active), leaves, upstream)
    return normed, torch.cat([q, k, v], 1), active, *gradients


def _eager_layer(
    x: Tensor, weight: Tensor, stacked: Tensor, gate_up: Tensor, counts: tuple[int, int],
    cos: Tensor, sin: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    normed = weight * (wide * scale).to(x.dtype)
    *turning, v = stacked.split([*counts, counts[1]], 1)
    q, k = (_turned(part, cos[:, None], sin[:, None]) for part in turning)
    gate, up = gate_up.chunk(2, -1)
    return normed, q, k, v, F.silu(gate) * up


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def _liger(rows: Rows) -> Callable[[], object]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def layer(
        x: Tensor, weight: Tensor, stacked: Tensor, gate_up: Tensor, counts: tuple[int, int],
        cos: Tensor, sin: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        # its own default, in_place, would write over the gradients that the next call reads
        normed = LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)
        *turning, v = stacked.split([*counts, counts[1]], 1)
        q, k = (part.transpose(0, 1)[None] for part in turning)
        q, k = LigerRopeFunction.apply(q, k, cos[None], sin[None])
        gate, up = gate_up.chunk(2, -1)
        active = LigerSiLUMulFunction.apply(gate, up)
        return normed, q[0].transpose(0, 1), k[0].transpose(0, 1), v, active

    return lambda: differentiated(rows, layer)


def check_passes(device: str) -> dict[str, float]:
    """Errors of each result of `ours` against float64."""
    rows = random_rows(device, 64)
    fields = {
        name: tuple(t.double() for t in value) if isinstance(value, tuple) else value.double()
        for name, value in vars(rows).items()
    }
    truth = differentiated(Rows(**fields), _eager_layer)
    names = ("normed", "rotated", "active", "d_x", "d_weight", "d_stacked", "d_gate_up")
    errors = {}
    for name, found, exact in zip(names, ours(rows), truth, strict=True):
        error = relative_error(found, exact.detach())
        limit = ERROR[found.dtype]
        assert error <= limit, f"{name}: error {error:.1e} is above {limit:.1e}, nothing was timed"
        errors[name] = error
    return errors
