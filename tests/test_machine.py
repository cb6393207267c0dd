"""What a process may use: cores, a device, memory; files as Linux has them, in containers, too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from polymath_fast import machine, memory
from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.rollout import tape_room

GIB = 2**30
PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def system(root: Path, groups: str, files: dict[str, str], available: int | None = None) -> Path:
    """A root folder whose process is in the control groups `groups`."""
    files = files | {"proc/self/cgroup": groups}
    if available is not None:
        files["proc/meminfo"] = f"MemTotal: 9 kB\nMemAvailable:   {available // 1024} kB\n"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cores_are_those_that_the_process_is_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
    assert machine.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert machine.cores() == 7


@pytest.mark.parametrize("there", [True, False])
def test_a_device_is_one_that_there_is(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert machine.device("cpu") == "cpu"
    assert machine.device("auto") == ("cuda" if there else "cpu")
    if there:
        assert machine.device("cuda") == "cuda"
        return
    with pytest.raises(UserError, match="--device cuda: torch sees no .*; --device cpu works"):
        machine.device("cuda")


def test_without_control_groups_it_is_the_machine(tmp_path: Path) -> None:
    assert machine.memory_bytes(tmp_path) == PHYSICAL
    assert machine.free_memory_bytes(tmp_path) is None
    assert machine.free_memory_bytes(system(tmp_path, "", {}, 3 * GIB)) == 3 * GIB


def test_a_container_of_version_2_sees_its_group_as_the_root(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/"
    files = {
        group + "memory.max": f"{GIB}\n",
        group + "memory.current": f"{700 * 2**20}\n",
        group + "memory.stat": f"anon 5\ninactive_file {100 * 2**20}\nactive_file 7\n",
    }
    root = system(tmp_path, "0::/\n", files, 9 * GIB)
    assert machine.memory_bytes(root) == GIB
    assert machine.free_memory_bytes(root) == GIB - 600 * 2**20


def test_the_limit_of_a_group_above_counts_and_max_is_none(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/user.slice/run.scope/memory.max": "max\n",
        "sys/fs/cgroup/user.slice/memory.max": f"{2 * GIB}\n",
        "sys/fs/cgroup/user.slice/memory.current": f"{GIB}\n",
    }
    root = system(tmp_path, "0::/user.slice/run.scope\n", files, 9 * GIB)
    assert machine.memory_bytes(root) == 2 * GIB
    assert machine.free_memory_bytes(root) == GIB


@pytest.mark.parametrize("seen", ["docker/af12/", ""], ids=["own path", "path of the host alone"])
def test_version_1_beside_an_empty_version_2(tmp_path: Path, seen: str) -> None:
    group = f"sys/fs/cgroup/memory/{seen}"
    files = {
        group + "memory.limit_in_bytes": f"{GIB}\n",
        group + "memory.usage_in_bytes": f"{GIB // 2}\n",
        group + "memory.stat": "inactive_file 1\ntotal_inactive_file 4096\n",
    }
    groups = "3:cpu,cpuacct:/\n4:memory:/docker/af12\n1:name=systemd:/\n0::/\n"
    root = system(tmp_path, groups, files, 9 * GIB)
    assert machine.memory_bytes(root) == GIB
    assert machine.free_memory_bytes(root) == GIB // 2 + 4096


def test_a_full_group_leaves_nothing(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": "4096", "sys/fs/cgroup/memory.current": "8192"}
    assert machine.free_memory_bytes(system(tmp_path, "0::/\n", files, GIB)) == 0


def test_by_default_the_tape_leaves_room_for_the_run_and_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    monkeypatch.setattr(tape_room, "in_tiles", lambda *_: True)
    where = {"engine": "transformers", "prompt_tokens": 60, "device": "cpu", "dtype": "bfloat16"}
    config = Config(num_generations=4096, groups_per_step=1, max_completion_length=512)
    rest = sum(memory.estimate(shape, Config(**vars(config) | {"tape_gib": 0.0}), **where).values())

    def tape_gib(machine_gib: float) -> float:
        monkeypatch.setattr(machine, "memory_bytes", lambda: int(machine_gib * GIB))
        rows = tape_room.tape_rows(shape, config, **where)
        return rows * tape_room.row_bytes(shape, config, tape_room.torch_dtype("bfloat16")) / GIB

    assert tape_gib(rest / 2) == tape_gib(rest) == 0
    assert tape_gib(rest + 10) == pytest.approx(6, rel=1e-3)
    few = Config(**vars(config) | {"num_generations": 4})
    assert tape_room.tape_rows(shape, few, **where) == 4 * 512
