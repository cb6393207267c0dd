"""The cache of built models: damage, failed builds, several processes, where it is."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from polymath_fast.errors import UserError
from polymath_fast.folders import cache, manifest
from polymath_fast.models import resolve_model


def build(target: Path) -> None:
    (target / "a.json").write_text("{}")
    save_file({"x": torch.arange(4.0)}, target / "model.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "a.json").write_text("{1"),
        lambda folder: (folder / "a.json").write_text("[]"),
        lambda folder: (folder / "a.json").unlink(),
        lambda folder: (folder / manifest.NAME).unlink(),
        lambda folder: (folder / "code.py").write_text("evil"),
    ],
)
def test_a_damaged_cache_is_built_again_aloud(damage: Any, own_cache: Path) -> None:
    said: list[str] = []
    folder = cache.build_once("x", build, notify=said.append)
    assert said == []
    damage(folder)
    assert cache.build_once("x", build, notify=said.append) == folder
    assert len(said) == 1 and "damaged" in said[0] and "again" in said[0]
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert (folder / "a.json").read_text() == "{}"


def test_a_build_that_fails_leaves_nothing(own_cache: Path) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build_once("x", fail)
    assert [path.name for path in own_cache.iterdir() if path.is_dir()] == []
    (own_cache / ".x.partial").mkdir()
    (own_cache / ".x.partial" / "left over by a killed process").touch()
    assert len(list(cache.build_once("x", build).iterdir())) == 3


def slow_build(target: Path) -> None:
    with (target.parent / "builds").open("a") as log:
        log.write("built\n")
    time.sleep(0.5)
    build(target)


def ask(_: int) -> str:
    return str(cache.build_once("raced", slow_build))


def test_processes_that_ask_at_once_build_once(own_cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(ask, range(4), chunksize=1) == [str(own_cache / "raced")] * 4
    assert (own_cache / "builds").read_text() == "built\n"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("POLYMATH_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="POLYMATH_FAST_CACHE"):
        resolve_model("random:tiny")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("POLYMATH_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / "polymath_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / ".cache" / "polymath_fast"
