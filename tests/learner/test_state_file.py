"""Optimizer state in a file of its own, which memory holds a chunk of."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from polymath_fast.errors import UserError
from polymath_fast.learner import state_file
from polymath_fast.learner.state_file import StateFile

KINDS = {"master": torch.int16, "exp_avg": torch.float32}


def resident_bytes(away: StateFile) -> int:
    """Of the file's pages, those that this process has in memory."""
    place, inside = next(iter(away.tensors.values())).data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split()[0]
        if "-" in word:
            first, last = (int(end, 16) for end in word.split("-"))
            inside = first <= place < last
        elif inside and word == "Rss:":
            return int(line.split()[1]) << 10
    raise AssertionError("the file is not mapped")


@pytest.mark.parametrize("chunk", [7, 100, 1024, 10_000])
def test_every_chunk_is_visited_once_and_stays(tmp_path: Path, chunk: int) -> None:
    """Chunks need not end with pages, nor tensors with chunks."""
    away = StateFile(tmp_path, KINDS, 5003, chunk)
    assert not any(tensor.any() for tensor in away.tensors.values())
    spans = []

    def visit(start: int, stop: int, here: dict[str, torch.Tensor]) -> None:
        spans.append((start, stop))
        here["master"] += torch.arange(start, stop, dtype=torch.int16)
        here["exp_avg"] += here["master"]

    for _ in range(3):
        away.sweep(visit)
        away.settle()
    assert spans == 3 * [(s, min(s + chunk, 5003)) for s in range(0, 5003, chunk)]
    numbers = torch.arange(5003)
    assert torch.equal(away.tensors["master"], (3 * numbers).to(torch.int16))
    assert torch.equal(away.tensors["exp_avg"], (6 * numbers).float())


def test_memory_holds_a_chunk_and_the_folder_no_name(tmp_path: Path) -> None:
    mib = 1 << 20
    away, seen = StateFile(tmp_path, KINDS, 16 * mib, chunk=mib), []

    def visit(start: int, stop: int, here: dict[str, torch.Tensor]) -> None:
        for tensor in here.values():
            tensor += 1
        seen.append(resident_bytes(away))

    away.sweep(visit)
    assert not list(tmp_path.iterdir())
    assert 6 * mib <= max(seen) < 12 * mib  # of 96, and 6 are a chunk's
    assert resident_bytes(away) == 0
    assert all((tensor == 1).all() for tensor in away.tensors.values())
    assert resident_bytes(away) > 90 * mib  # read as a whole, outside of a sweep
    away.settle()
    assert resident_bytes(away) == 0


def test_a_part_may_be_empty(tmp_path: Path) -> None:
    away = StateFile(tmp_path, KINDS, 0)
    away.sweep(lambda *_: pytest.fail("nothing is there"))
    away.settle()
    assert [len(tensor) for tensor in away.tensors.values()] == [0, 0]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, r"needs 5\.6 GiB on the disk of .*; choose another --output-dir"),
        (errno.EROFS, r"no file in .*: Read-only file system"),
    ],
)
def test_a_disk_that_will_not_do_is_named(tmp_path, monkeypatch, code, words) -> None:
    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(UserError, match=f"--offload-optimizer.*{words}"):
        StateFile(tmp_path, KINDS, 10**9)


def test_room_is_made_where_the_system_cannot_reserve_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(state_file, "_ZEROS", bytes(100))
    away = StateFile(tmp_path, KINDS, 1000)
    away.tensors["exp_avg"] += torch.arange(1000)
    away.settle()
    assert torch.equal(away.tensors["exp_avg"], torch.arange(1000.0))
