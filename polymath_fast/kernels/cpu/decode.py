"""Decoding on a CPU in tiles: new tokens of every completion, all layers in one kernel.

B completions, Hq / Hkv query and key heads, D head size. Arrays are fp32, or bf16 that arrives as
uint16; a word is what a product counts in, one fp32 or two bf16.
"""

from __future__ import annotations

import numpy as np

from polymath_fast.kernels.cpu import blocks, tiles
from polymath_fast.kernels.cpu.decode_attention import attend, make_room, tokens_at_once
from polymath_fast.kernels.cpu.decode_products import activate, add_projection, address, project
from polymath_fast.kernels.cpu.jit import BORROWED, njit
from polymath_fast.kernels.cpu.layers import copy_row, rms_norm
from polymath_fast.kernels.cpu.moves import copy
from polymath_fast.kernels.cpu.team import barrier, next_task

PHASES = 8
"""of one layer: norm, projections, attention, output, norm, tape, gate and up, down"""
_TASKS = 4
"""of attention that a thread should have at least"""


def step(
    threads, counters, count, norms, head_norms, biases, qkv, output, gate_up, down, heads, cos,
    sin, eps, firsts, lengths, slots, keys, values, prompt_len, prompt_keys, prompt_values, scale,
    hidden, stacked, attended, lse, between, normed, active, out, kept_rows, kept_hidden,
    kept_stacked, kept_attended, kept_lse, kept_between, kept_gate_up,
):  # fmt: skip
    """All layers for more tokens of every completion; `PHASES` phases a layer, see `team`.

    R = `count` rounded up to whole tiles, L layers. norms (2 L + 1, H): of attention and MLP, layer
    by layer, and the last. head_norms (L, Hq + Hkv, D) or (L, 0, 1); biases (L, (Hq + 2 Hkv) D)
    fp32 or (L, 0). Weights are packed (L, panels, words of inputs, 48); gate_up holds a panel of
    gate, then one of up, by turns. cos, sin (count, D). Rows firsts[b] to firsts[b + 1] are the
    next tokens of completion b; lengths (B,) positions filled before them. keys and values (L,
    slots, ...) as in `decode_attention.store`, those of completion b in slots[b]; those of the
    prompt alike without slots.

    hidden (R, H) is the input; out (R, H) the result, after the last norm. Each layer overwrites
    hidden, stacked (R, Hq + 2 Hkv, D) before norm and rotation, attended (R, Hq D), lse (R, Hq) and
    between (R, H) after attention; normed (R, H) and active (R, I) are scratch. Row i of them goes
    to row kept_rows[i] of kept_..., of which there is one a layer (and of kept_hidden one more, for
    what the last norm reads), nowhere if that is negative, or if kept_rows is (0,), not (count,);
    kept_gate_up is (L, panels, rows, 96): 48 columns of gate, then the same ones of up.
    """
    room = make_room(stacked, heads // keys.shape[2], keys, values, prompt_keys)
    tile = np.empty((2 * blocks.rows_of(qkv), tiles.COLUMNS), np.float32)
    projected = stacked.reshape(stacked.shape[0], stacked.shape[1] * stacked.shape[2])
    kept_projected = kept_stacked.reshape(kept_stacked.shape[0], -1, projected.shape[1])
    before = np.empty(blocks.SAVED, np.uint8)
    _layers(
        threads, counters, count, norms, head_norms, biases, qkv, output, gate_up, down, heads, cos,
        sin, eps, firsts, lengths, slots, keys, values, prompt_len, prompt_keys, prompt_values,
        scale, hidden, stacked, projected, attended, lse, between, normed, active, out, kept_rows,
        kept_hidden, kept_projected, kept_attended, kept_lse, kept_between, kept_gate_up, room,
        tile, before,
    )  # fmt: skip


@njit(**BORROWED)
def _layers(
    threads, counters, count, norms, head_norms, biases, qkv, output, gate_up, down, heads, cos,
    sin, eps, firsts, lengths, slots, keys, values, prompt_len, prompt_keys, prompt_values, scale,
    hidden, stacked, projected, attended, lse, between, normed, active, out, kept_rows, kept_hidden,
    kept_projected, kept_attended, kept_lse, kept_between, kept_gate_up, room, tile,
    before,
):  # fmt: skip
    """`step` with room for everything."""
    blocks.begin(qkv, before)
    key_heads = keys.shape[2]
    together = tokens_at_once(heads // key_heads)
    chunk = max(1, min(together, lengths.size * key_heads // (_TASKS * threads)))
    for layer in range(keys.shape[0]):
        phase = PHASES * layer
        _norm_rows(threads, counters, phase, hidden, count, norms[2 * layer], eps, normed)
        panel = next_task(counters, phase + 1)
        while panel < qkv.shape[1]:
            later = next_task(counters, phase + 1)
            following = address(qkv[layer], later)
            weights = qkv[layer, panel]
            project(normed, count, weights, panel, following, tile, biases[layer], projected)
            panel = later
        barrier(threads, counters, phase + 1)
        while True:
            task = next_task(counters, phase + 2)
            b, head = task // key_heads * chunk, task % key_heads
            if b >= lengths.size:
                break
            end = firsts[min(b + chunk, lengths.size)]
            for first in range(firsts[b], end, together):
                attend(
                    first, min(first + together, end), b, firsts, lengths, slots, stacked, heads,
                    head, cos, sin, head_norms[layer], eps, keys[layer], values[layer], prompt_len,
                    prompt_keys[layer, head], prompt_values[layer, head], scale, room, attended,
                    lse,
                )  # fmt: skip
        barrier(threads, counters, phase + 2)
        add_projection(
            threads, counters, phase + 3, attended, count, output[layer], tile, hidden, between
        )
        last = norms[2 * layer + 1]
        _norm_rows(threads, counters, phase + 4, between, count, last, eps, normed)
        while True:
            top = next_task(counters, phase + 5) * tiles.ROWS
            if top >= kept_rows.size:
                break  # no barrier: nobody overwrites these before the next one
            rows = kept_rows[top : top + tiles.ROWS]
            _keep(top, hidden, rows, kept_hidden[layer])
            _keep(top, projected, rows, kept_projected[layer])
            _keep(top, attended, rows, kept_attended[layer])
            _keep(top, lse, rows, kept_lse[layer])
            _keep(top, between, rows, kept_between[layer])
        panel = next_task(counters, phase + 6)
        while panel < gate_up.shape[1] // 2:
            later = next_task(counters, phase + 6)
            following = address(gate_up[layer], 2 * later)
            weights, kept = gate_up[layer, 2 * panel :], kept_gate_up[layer, panel]
            activate(normed, count, weights, panel, following, tile, active, kept_rows, kept)
            panel = later
        barrier(threads, counters, phase + 6)
        add_projection(
            threads, counters, phase + 7, active, count, down[layer], tile, between, hidden
        )
    end = PHASES * keys.shape[0]
    _norm_rows(threads, counters, end, hidden, count, norms[-1], eps, out)
    if next_task(counters, end + 1) == 0:
        _keep(0, hidden, kept_rows, kept_hidden[keys.shape[0]])
    barrier(threads, counters, end + 1)
    blocks.end(qkv, before)


@njit(**BORROWED)
def gate_and_up(start, stop, kept, rows, out):
    """Rows [start, stop) of out (R, 2 I): gate, then up, of rows[i] of kept (panels, rows, 96)."""
    width = out.shape[1] // 2
    half, step = tiles.COLUMNS * out.itemsize, width * out.itemsize
    whole = width // tiles.COLUMNS
    for i in range(start, stop):
        origin = kept.ctypes.data + rows[i] * kept.strides[1]
        place = out.ctypes.data + i * out.strides[0]
        for _ in range(whole):
            copy(origin, place, half)
            copy(origin + half, place + step, half)
            origin += kept.strides[0]
            place += half
        if whole < kept.shape[0]:
            rest = kept[whole, rows[i]]
            copy_row(rest, out[i, whole * tiles.COLUMNS : width])
            copy_row(rest[tiles.COLUMNS :], out[i, width + whole * tiles.COLUMNS :])


@njit(**BORROWED)
def _keep(top, source, rows, kept):
    for i in range(rows.size):
        if rows[i] >= 0:
            copy_row(source[top + i], kept[rows[i]])


@njit(**BORROWED)
def _norm_rows(threads, counters, phase, x, count, weight, eps, out):
    while True:
        top = next_task(counters, phase) * tiles.ROWS
        if top >= count:
            break
        rms_norm(top, min(top + tiles.ROWS, count), x, weight, eps, out)
    barrier(threads, counters, phase)
