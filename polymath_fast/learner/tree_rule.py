"""When sharing the rows of common beginnings pays: what it saves against what attention pays.

In units of one row of one layer. With hidden size H a layer has about 11 H^2 weights, so a row
costs 65 H^2 operations, forward and backward. To see one more segment costs a row

* in the CPU's compiled tiles, which lay the keys of a row's whole path side by side, next to
  nothing: the same keys would be its own without the tree. What the rows of a segment add to the
  gradient of a key above them goes to memory once more. Segments of one token took no longer than
  those of eight, measured at 64 x 128 and 256 x 32 completions;
* in pieces merged by log-sum-exp (other CPUs) about ten passes over H float32 numbers: query,
  piece, output before and after forward; gradient, output, query, piece and its sum backward. At
  16 to 100 operations a byte that the machine moves, 640 H to 4000 H operations: with H = 576 to
  1536 a hundredth to a tenth of a row, 1/16 is taken;
* in the Triton kernels, which merge nothing, one tile of up to 128 keys more, mostly masked: up to
  4 * 128 H operations forward and 6 * 64 H backward, and tiles run at half the speed of the large
  products: at H >= 1024 less than 1/64.

Rows that are saved save attention, too; that is not counted. Elsewhere a segment costs a CPU some
calls as well, as much as a few rows: hence `SHORTEST`. Each run of common tokens is judged by
itself.
"""

from __future__ import annotations

import torch

from polymath_fast.errors import UserError
from polymath_fast.kernels import dispatch
from polymath_fast.kernels.prefix_attention import NO_TREES
from polymath_fast.learner.prefix_tree import Rule

SHORTEST = {"triton": 8, "tiles": 1, "cpu": 8, "reference": 8}
"""implementation of attention -> tokens of a shared segment"""
PRICE = {"triton": 1 / 64, "tiles": 1 / 256, "cpu": 1 / 16, "reference": 1 / 16}
"""implementation of attention -> rows that it costs a row to see one more segment"""
LEAST = 1 / 64
"""share of the rows that must be saved"""
LEAST_ELSEWHERE = 1 / 16
"""the same where all of attention moves to another implementation: it is 5 to 15 % of a step"""


def rule_for(mode: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Rule | None:
    """The rule of `--prefix-tree` for a learner like this; None: no tree.

    Raises:
        UserError: `mode` is "on" and nothing fast takes a tree here.
    """
    if mode == "off":
        return None
    plain, name, refusal = _implementations(device, dtype)
    if mode == "on":
        if refusal is not None:
            raise UserError(f"--prefix-tree is on, but {refusal}; auto works")
        return Rule(shortest=SHORTEST[_kind(name, dtype, head_dim)])
    if refusal is not None:
        return None
    least = LEAST if plain == name else LEAST_ELSEWHERE
    kind = _kind(name, dtype, head_dim)
    return Rule(shortest=SHORTEST[kind], price=PRICE[kind], least=least)


def _implementations(device: torch.device, dtype: torch.dtype) -> tuple[str, str, str | None]:
    """What computes attention without a tree and with one, and why that is no good."""
    try:
        plain, _ = dispatch.choose_here("prefix_attention", device, dtype)
        name, reason = dispatch.choose_here("prefix_attention", device, dtype, unable=NO_TREES)
    except ValueError as error:
        return "", "", str(error)
    if device.type == "cuda" and name == "reference" and not reason.startswith("asked"):
        return plain, name, f"only the slow reference of attention takes a tree here ({reason})"
    return plain, name, None


def _kind(name: str, dtype: torch.dtype, head_dim: int) -> str:
    """An implementation, or "tiles" where the CPU's attention runs in compiled ones."""
    if name != "cpu":
        return name
    from polymath_fast.kernels.prefix_attention import tiles

    compiled = tiles.fits(torch.empty(1, 1, head_dim, dtype=dtype), 1.0)
    return "tiles" if compiled else name
