"""Decoding on a CPU in tiles: new tokens of every completion, a packed KV cache.

Keys are kept as columns of panels of 64, values as rows (in bf16 as pairs of them), which is how
the products read them; a completion's own panels lie in the cache, those of a prompt that all share
in one place.

B completions, Hq / Hkv query and key heads, D head size. Arrays are fp32, or bf16 that arrives as
uint16; a word is what a product counts in, one fp32 or two bf16.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from polymath_fast.kernels.cpu import tiles
from polymath_fast.kernels.cpu.attention_parts import PANEL, ROWS, products, softmax, store_row
from polymath_fast.kernels.cpu.layers import rms_norm, rotated_head
from polymath_fast.kernels.cpu.scalar import exp, maximum, put, value, words
from polymath_fast.kernels.cpu.team import barrier, next_task
from polymath_fast.kernels.cpu.tiles import square_tile

PHASES = 7
"""of one layer: norm, projections, attention, output, norm, gate and up, down"""
_LOWEST = np.float32(-80.0)


@njit(nogil=True, cache=True)
def store(start, stop, k, v, first, keys, values):
    """Keys and values of rows k, v (T, Hkv, D) into positions [first, first + T) of one completion;
    a range of heads.

    keys (Hkv, panels, D words, 64) and values (Hkv, panels, D panels, 64 positions, 64) of words, a
    pair of positions to a word in bf16.
    """
    for head in range(start, stop):
        for row in range(k.shape[0]):
            _store_key(words(k[row, head]), first + row, keys[head])
            _store_value(v[row, head], first + row, values[head])


@njit(nogil=True, cache=True)
def step(
    threads, counters, hidden, count, norms, head_norms, biases, qkv, output, gate_up, down, heads,
    cos, sin, eps, firsts, lengths, slots, keys, values, prompt_len, prompt_keys, prompt_values,
    scale, normed, stacked, attended, active, out,
):  # fmt: skip
    """All layers for more tokens of every completion; `PHASES` phases a layer, see `team`.

    R = `count` rounded up to whole tiles, L layers. hidden (R, H) goes in and is overwritten; out
    (R, H) its final norm. norms (2 L + 1, H): of attention and MLP, layer by layer, and the last.
    head_norms (L, Hq + Hkv, D) or (L, 0, 1); biases (L, (Hq + 2 Hkv) D) fp32 or (L, 0). Weights are
    packed (L, panels, words of inputs, 48); gate_up holds a panel of gate, then one of up, by
    turns. cos, sin (count, D). Rows firsts[b] to firsts[b + 1] are the next tokens of completion b;
    lengths (B,) positions filled before them. keys and values (L, slots, ...) as in `store`, those
    of completion b in slots[b]; those of the prompt alike without slots. normed (R, H),
    stacked (R, Hq + 2 Hkv, D), attended (R, Hq D) and active (R, I) are scratch.
    """
    key_heads, size = keys.shape[2], stacked.shape[2]
    group = heads // key_heads
    width = (keys.shape[3] + prompt_keys.shape[2]) * PANEL
    queries = np.zeros((-(-group // ROWS) * ROWS, size), stacked.dtype)
    scores = np.empty((ROWS, width), np.float32)
    probs = np.zeros((ROWS, width), stacked.dtype)
    sums = np.empty((ROWS, values.shape[4] * PANEL), np.float32)
    tile = np.empty((2 * tiles.ROWS, tiles.COLUMNS), np.float32)
    wide = np.empty(stacked.shape[2], np.float32)
    flat = stacked.reshape(stacked.shape[0], -1)
    for layer in range(keys.shape[0]):
        phase = PHASES * layer
        _norm_rows(threads, counters, phase, hidden, count, norms[2 * layer], eps, normed)
        while True:
            panel = next_task(counters, phase + 1)
            if panel >= qkv.shape[1]:
                break
            _project(normed, count, qkv[layer, panel], panel, tile, biases[layer], flat)
        barrier(threads, counters, phase + 1)
        while True:
            task = next_task(counters, phase + 2)
            if task >= lengths.size * key_heads:
                break
            b, head = task // key_heads, task % key_heads
            own_keys, own_values = keys[layer, slots[b], head], values[layer, slots[b], head]
            for i in range(firsts[b], firsts[b + 1]):  # in order: each row sees those before it
                position = lengths[b] + i - firsts[b]
                _place(
                    stacked[i], heads, head, cos[i], sin[i], head_norms[layer], eps, position,
                    own_keys, own_values, wide, queries,
                )  # fmt: skip
                _attend(
                    queries, group, position + 1, own_keys, own_values, prompt_len,
                    prompt_keys[layer, head], prompt_values[layer, head], scale, scores, probs,
                    sums, attended[i, head * group * size : (head + 1) * group * size],
                )  # fmt: skip
        barrier(threads, counters, phase + 2)
        _add_projection(threads, counters, phase + 3, attended, count, output[layer], tile, hidden)
        last = norms[2 * layer + 1]
        _norm_rows(threads, counters, phase + 4, hidden, count, last, eps, normed)
        while True:
            panel = next_task(counters, phase + 5)
            if panel >= gate_up.shape[1] // 2:
                break
            _activate(normed, count, gate_up[layer, 2 * panel :], panel, tile, active)
        barrier(threads, counters, phase + 5)
        _add_projection(threads, counters, phase + 6, active, count, down[layer], tile, hidden)
    _norm_rows(threads, counters, PHASES * keys.shape[0], hidden, count, norms[-1], eps, out)


@njit(nogil=True, cache=True)
def _norm_rows(threads, counters, phase, x, count, weight, eps, out):
    while True:
        top = next_task(counters, phase) * tiles.ROWS
        if top >= count:
            break
        rms_norm(top, min(top + tiles.ROWS, count), x, weight, eps, out)
    barrier(threads, counters, phase)


@njit(nogil=True, cache=True)
def _add_projection(threads, counters, phase, x, count, packed, tile, hidden):
    """hidden += x @ a weight; tasks are panels of its outputs."""
    while True:
        panel = next_task(counters, phase)
        if panel >= packed.shape[0]:
            break
        left = panel * tiles.COLUMNS
        right = min(left + tiles.COLUMNS, hidden.shape[1])
        for top in range(0, count, tiles.ROWS):
            _tile(x, top, packed[panel], tile)
            for r in range(min(tiles.ROWS, count - top)):
                _add_row(tile[r], hidden[top + r, left:right])
    barrier(threads, counters, phase)


@njit(nogil=True, cache=True)
def _project(x, count, packed, panel, tile, bias, out):
    left = panel * tiles.COLUMNS
    right = min(left + tiles.COLUMNS, out.shape[1])
    for top in range(0, count, tiles.ROWS):
        _tile(x, top, packed, tile)
        for r in range(min(tiles.ROWS, count - top)):
            if bias.size:
                _add(tile[r], bias[left:right])
            _round(tile[r], out[top + r, left:right])


@njit(nogil=True, cache=True)
def _activate(x, count, packed, panel, tile, out):
    """One panel of silu(gate) * up; packed[0] holds the gate's columns, packed[1] those of up."""
    left = panel * tiles.COLUMNS
    right = min(left + tiles.COLUMNS, out.shape[1])
    for top in range(0, count, tiles.ROWS):
        _tile(x, top, packed[0], tile)
        _tile(x, top, packed[1], tile[tiles.ROWS :])
        for r in range(min(tiles.ROWS, count - top)):
            _silu_times(tile[r], tile[tiles.ROWS + r], out[top + r, left:right])


@njit(inline="always")
def _tile(x, top, packed, out):
    place = x.ctypes.data + top * x.strides[0]
    tiles.dot_tile(
        place, x.strides[0], 4, packed, packed.shape[0], out.ctypes.data, out.strides[0], False,
    )  # fmt: skip


@njit(nogil=True, cache=True)
def _add(row, other):
    for j in range(other.size):
        row[j] += other[j]


@njit(nogil=True, cache=True)
def _round(row, out):
    for j in range(out.size):
        put(out, j, row[j])


@njit(nogil=True, cache=True)
def _add_row(row, out):
    for j in range(out.size):
        put(out, j, value(out[j]) + row[j])


@njit(nogil=True, cache=True, error_model="numpy")
def _silu_times(gate, up, out):
    for j in range(out.size):
        sigmoid = np.float32(1) / (np.float32(1) + exp(-maximum(gate[j], _LOWEST)))
        put(out, j, gate[j] * sigmoid * up[j])


@njit(nogil=True, cache=True)
def _place(
    stacked, heads, head, cos, sin, norms, eps, position, keys, values, wide, queries
):  # fmt: skip
    """Rotated queries of one key head, and its new key and value in the cache."""
    key_heads = (stacked.shape[0] - heads) // 2
    group = heads // key_heads
    first = head * group
    for g in range(group):
        rotated_head(stacked[first + g], first + g, cos, sin, norms, eps, wide, queries[g])
    new_key = np.empty(stacked.shape[1], stacked.dtype)
    rotated_head(stacked[heads + head], heads + head, cos, sin, norms, eps, wide, new_key)
    _store_key(words(new_key), position, keys)
    _store_value(stacked[heads + key_heads + head], position, values)


@njit(nogil=True, cache=True)
def _attend(
    queries, group, own, keys, values, prompt_len, prompt_keys, prompt_values, scale, scores, probs,
    sums, out,
):  # fmt: skip
    """out (group D): attention of one key head's queries over prompt and `own` keys of its own."""
    base = -(-prompt_len // PANEL) * PANEL
    used = base + -(-own // PANEL) * PANEL
    size, per_word = queries.shape[1], 4 // queries.itemsize
    for top in range(0, group, ROWS):
        height = min(ROWS, group - top)
        products(queries[top : top + ROWS], prompt_len, prompt_keys, own, keys, scores)
        for r in range(height):
            total, _ = softmax(scores[r, :used], prompt_len, base, own, scale, probs[r, :used])
            scores[r, 0] = np.float32(1) / total
        for panel in range(used // PANEL):
            first_own = base // PANEL
            block = prompt_values[panel] if panel < first_own else values[panel - first_own]
            end = prompt_len if panel < first_own else base + own
            depth = -(-min(PANEL, end - panel * PANEL) // per_word)
            left = probs.ctypes.data + probs.itemsize * PANEL * panel
            for part in range(block.shape[0]):
                square_tile(
                    left, probs.strides[0], 4, block[part], depth,
                    sums.ctypes.data + 4 * part * PANEL, sums.strides[0], panel > 0,
                )  # fmt: skip
        for r in range(height):
            row = out[(top + r) * size : (top + r + 1) * size]
            store_row(row, sums[r], scores[r, 0])


@njit(nogil=True, cache=True)
def _store_key(row, position, keys):
    panel, column = position // PANEL, position % PANEL
    for word in range(row.size):
        keys[panel, word, column] = row[word]


def _store_value(row, position, values):
    raise NotImplementedError("compiled code only")


@overload(_store_value)
def _compiled_store_value(row, position, values):
    if row.dtype == types.uint16:

        def store(row, position, values):
            panel, within = position // PANEL, position % PANEL
            halves = values.view(np.uint16)  # of a word, the low one from the even position
            for d in range(row.size):
                halves[panel, d // PANEL, within // 2, 2 * (d % PANEL) + within % 2] = row[d]
    else:

        def store(row, position, values):
            panel, within = position // PANEL, position % PANEL
            for d in range(row.size):
                values[panel, d // PANEL, within, d % PANEL] = row[d]

    return store
