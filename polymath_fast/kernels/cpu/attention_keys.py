"""Keys and values as attention's backward reads them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from polymath_fast.kernels.cpu.attention_parts import copy_rows, turn_block, whole_panels, zero
from polymath_fast.kernels.cpu.jit import BORROWED, njit
from polymath_fast.kernels.cpu.panel_blocks import PANEL


class Keys(NamedTuple):
    """What queries of one head see, in whole panels: of zeros behind the last one."""

    rows: np.ndarray
    """(keys, D)"""
    turned: np.ndarray
    """(panels, D, 64): the same as columns"""
    values: np.ndarray
    """(keys, D)"""


def room_for_keys(count, size, dtype, heads=()):
    """`Keys` of `count`, uninitialised."""
    rows = (*heads, whole_panels(count), size)
    turned = (*heads, whole_panels(count) // PANEL, size, PANEL)
    return Keys(np.empty(rows, dtype), np.empty(turned, dtype), np.empty(rows, dtype))


@njit(**BORROWED)
def pack_prompt_keys(start, stop, k, v, count, prompts):
    """`prompts` of the first `count` rows of k and v; a range of heads."""
    for head in range(start, stop):
        copy_rows(k, 0, count, head, prompts.rows[head], 0)
        copy_rows(v, 0, count, head, prompts.values[head], 0)
        complete(prompts.rows[head], prompts.turned[head], prompts.values[head], count)


@njit(**BORROWED)
def complete(rows, turned, values, count):
    """What follows from the first `count` rows of keys and values."""
    for row in range(count, whole_panels(count)):
        zero(rows[row])
        zero(values[row])
    for panel in range(whole_panels(count) // PANEL):
        turn_block(rows[panel * PANEL :], turned[panel])
