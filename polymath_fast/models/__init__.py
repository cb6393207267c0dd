"""From the value of --model to a checked Hugging Face folder on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polymath_fast.errors import UserError
from polymath_fast.models import embedded_model, random_models

# Weights as safetensors, tokenizers and settings; never pickles, never code.
_DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def resolve_model(
    name: str, revision: str | None = None, notify: Callable[[str], None] = print
) -> Path:
    """The folder of a model; what is missing is converted, built or downloaded first.

    `name` is embedded:smollm2, random:FAMILY, random:CONFIG.JSON, a local folder or a hub id, the
    last with an optional `revision`. The folder has a config.json, a tokenizer and complete
    safetensors. Raises UserError.
    """
    kind, colon, rest = name.partition(":")
    local = Path(name).expanduser()
    is_hub_id = not colon and not local.exists() and not name.startswith((".", "/", "~"))
    if revision is not None and not is_hub_id:
        raise UserError(f"--revision {revision} goes with a hub id, but --model is {name}")
    if name == "embedded:smollm2":
        return embedded_model.folder(notify)
    if colon and kind == "random":
        return random_models.folder(rest, notify)
    if is_hub_id:
        return check_folder(_download(name, revision))
    if local.is_dir():
        return check_folder(local.absolute())
    what = "a file, not a folder" if local.is_file() else "not there"
    raise UserError(
        f"--model {name} is {what}; give embedded:smollm2, random:FAMILY, a folder with "
        "config.json and *.safetensors, or a hub id such as Qwen/Qwen2.5-0.5B"
    )


def check_folder(folder: Path) -> Path:
    """Return `folder` if it holds a model that can be loaded safely. Raises UserError."""
    read_config(folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise UserError(
            f"{folder} has no tokenizer (none of {', '.join(_TOKENIZERS)}); save one there with "
            f"AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = (
            f"only pickles ({pickles[0]}), which can run code when loaded" if pickles else "none"
        )
        raise UserError(
            f"{folder} must hold its weights as *.safetensors; it has {found}. Convert them where "
            "that is safe: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
        )
    for path in [*weights, *_shards(folder)]:
        _check_weights(path)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises UserError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a model folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{path}: names no model_type, so transformers cannot tell what it is")
    return config


def context_length(folder: Path) -> int | None:
    """Positions the model was built for, or None where its config.json does not say."""
    config = read_config(folder)
    return config.get("text_config", config).get("max_position_embeddings")


def _shards(folder: Path) -> list[Path]:
    """The files an index sends a loader to; they must lie in the folder."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return []
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an index of weights ({error!r})") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{path} names {name!r}, which is not in the folder; download it again")
    return [folder / name for name in names]


def _check_weights(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or incomplete ({error}); download it again") from None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_DOWNLOADED))
    except HFValidationError:
        reason = "no such folder, and not a hub id (OWNER/NAME) either"
    except RevisionNotFoundError:
        reason = f"the hub has the model, but not the revision {revision}"
    except RepositoryNotFoundError:
        reason = "the hub does not know it, or HF_TOKEN gives no access to it"
    except LocalEntryNotFoundError:
        reason = (
            "no such folder, not in the Hugging Face cache, and the hub cannot be reached; "
            "the model embedded:smollm2 needs no network"
        )
    except OSError as error:
        reason = f"the download failed ({error})"
    raise UserError(f"--model {name}: {reason}")
