"""Bad inputs that a kernel met on a GPU: noted there, raised on the host later.

Targets outside the vocabulary, and offsets of completions that do not rise from 0 to N.

To raise at once the host would have to wait. Kernels write what they met to pinned host memory,
which both sides see; the next operator call looks at it, which costs nothing.
"""

from __future__ import annotations

import torch

_notes: dict[torch.device, torch.Tensor] = {}
_VALUE_BITS = 32


def note_for(device: torch.device) -> torch.Tensor:
    """(4,) int64 that kernels on `device` write to.

    (row + 1, target) in one number, and V; (place + 1, offset) in one number, and N.
    """
    if device not in _notes:
        # whoever asks first may be sampling; the note is cleared outside of inference mode, too
        with torch.inference_mode(False):
            _notes[device] = torch.zeros(4, dtype=torch.int64, pin_memory=device.type == "cuda")
    return _notes[device]


def raise_noted(device: torch.device) -> None:
    """Raise what kernels that have ended on `device` noted, once; waits for nothing.

    Raises:
        ValueError: naming the target or offset, its place and the rule.
    """
    note = _notes.get(device)
    if note is None:
        return
    target, vocab, offset, count = note.tolist()
    note.zero_()
    if offset:
        place, value = _unpack(offset)
        raise ValueError(
            f"cu_seqlens[{place}] was {value} in an earlier call on {device}: offsets must rise "
            f"from 0 to the {count} tokens given; the loss of that call was NaN and had no "
            "gradient. For example [0, 3, 7] for completions of 3 and 4 tokens"
        )
    if target:
        row, value = _unpack(target)
        raise ValueError(
            f"targets[{row}] was {value} in an earlier call on {device}, outside [0, {vocab}); "
            "that row had no log-prob and no gradient. There is no ignored id such as -100: give "
            "rows that do not count any id in there, such as 0, and leave them out of a loss with "
            "mask="
        )


def _unpack(packed: int) -> tuple[int, int]:
    """Where, and what was there, as int32."""
    return (packed >> _VALUE_BITS) - 1, (packed + 2**31) % 2**_VALUE_BITS - 2**31


def verify_targets(device: torch.device | str = "cuda") -> None:
    """Wait for `device`, and raise if an operator met bad targets or offsets since the last look.

    Every operator raises for the calls before it; this is for the last one, or for where a step
    waits anyway.

    Raises:
        ValueError: naming one such target or offset, its place and the rule.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.synchronize(device)
    raise_noted(device)
