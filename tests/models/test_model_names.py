"""What a model's name may lead to: nowhere, a folder, the Hub; and what is not loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polymath_fast.errors import UserError
from polymath_fast.models import check_folder, context_length, resolve_model


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("embedded:smolm2", ["--model embedded:smolm2", "embedded:smollm2"]),
        ("random:tny", ["perhaps you meant random:tiny"]),
        ("random:", ["families: tiny"]),
        ("./nowhere", ["not there"]),
        ("/nowhere/at/all", ["not there"]),
        ("a/b/c", ["not a hub id"]),
        ("http://host/model", ["not there"]),
        ("a b", ["not a hub id"]),
    ],
)
def test_a_name_that_leads_nowhere(name: str, parts: list[str], own_cache: Path) -> None:
    with pytest.raises(UserError) as error:
        resolve_model(name)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_revision_only_goes_with_a_hub_id(copy: Path) -> None:
    for name in ("embedded:smollm2", "random:tiny", str(copy)):
        with pytest.raises(UserError, match="--revision main goes with a hub id"):
            resolve_model(name, "main")


def test_a_hub_id_is_downloaded_without_pickles_or_code(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **given: Any) -> str:
        asked.update(given, name=name)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("owner/name", "abc123") == copy
    assert (asked["name"], asked["revision"]) == ("owner/name", "abc123")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*", "*.bin", "*.py", "*.pt"} & {*asked["allow_patterns"]}


def test_a_hub_id_without_a_network(tmp_path: Path) -> None:
    code = "from polymath_fast.models import *\ntry: resolve_model('owner/name')\n"
    code += "except UserError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--model owner/name" in done.stdout and "cannot be reached" in done.stdout
    assert "embedded:smollm2 needs no network" in done.stdout


def test_a_good_folder_is_taken_as_it_is(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(copy)) == copy
    monkeypatch.chdir(copy.parent)
    assert resolve_model("model") == copy


def break_header(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes((0xFFFFFFFF).to_bytes(8, "little") + b"{}")


def cut_weights(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def only_pickles(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")


def index(weight_map: object) -> str:
    return json.dumps({"weight_map": weight_map})


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda d: (d / "config.json").unlink(), ["no config.json"]),
        (lambda d: (d / "config.json").write_text("{"), ["config.json", "not readable as JSON"]),
        (lambda d: (d / "config.json").write_text("[]"), ["names no model_type"]),
        (lambda d: (d / "config.json").write_text("{}"), ["names no model_type"]),
        (lambda d: (d / "tokenizer.json").unlink(), ["no tokenizer", "save_pretrained"]),
        (lambda d: (d / "model.safetensors").unlink(), ["*.safetensors", "it has none"]),
        (only_pickles, ["only pickles (pytorch_model.bin)", "run code", "save_pretrained"]),
        (break_header, ["model.safetensors", "damaged"]),
        (cut_weights, ["model.safetensors", "damaged"]),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(
                index({"a": "x-2.safetensors"})
            ),
            ["'x-2.safetensors'", "not in the folder"],
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(
                index({"a": "../model/model.safetensors"})
            ),
            ["not in the folder"],
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(index([1])),
            ["not an index"],
        ),
    ],
)
def test_a_folder_that_cannot_be_loaded_safely(damage: Any, parts: list[str], copy: Path) -> None:
    damage(copy)
    with pytest.raises(UserError) as error:
        check_folder(copy)
    assert str(copy) in str(error.value)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_file_is_not_a_folder(copy: Path) -> None:
    with pytest.raises(UserError, match="a file, not a folder"):
        resolve_model(str(copy / "model.safetensors"))


def test_context_length_of_nested_settings(copy: Path) -> None:
    (copy / "config.json").write_text(
        json.dumps({"model_type": "x", "text_config": {"max_position_embeddings": 77}})
    )
    assert context_length(copy) == 77
    (copy / "config.json").write_text(json.dumps({"model_type": "x"}))
    assert context_length(copy) is None
