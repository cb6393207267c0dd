"""The list of a folder's files with their sizes and sha256, written last and checked first.

A folder whose manifest verifies is byte for byte what was saved. The manifest guards against torn
writes, flipped bits and files that a loader would pick up without anybody having saved them; it is
no signature: whoever can rewrite the files can rewrite the manifest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path, PurePosixPath

from polymath_fast.folders import kinds

NAME = "manifest.json"
FORMAT = 1
# What transformers, vLLM and our own loader would read when they find it in a model folder.
LOADABLE = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".py", ".jinja", ".model"}


class TornFolder(ValueError):
    """The folder is not what was saved; the message says in which way."""


class UnreadableFolder(TornFolder):
    """The disk gave an error, perhaps a passing one: what is in the folder is not known."""


def write(folder: Path, **fields: object) -> None:
    """Flush every file below `folder` to disk, then write the manifest and flush that too.

    `fields` are kept next to the list of files and come back from `verify`.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if kinds.is_file(path):
            files[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
            fsync(path)
    target = folder / NAME
    target.write_text(seal({"format": FORMAT, **fields, "files": files}), encoding="utf-8")
    fsync(target)
    for directory in [*(path for path in folder.rglob("*") if kinds.is_folder(path)), folder]:
        fsync(directory)


def verify(folder: Path, *, hashes: bool = True) -> dict:
    """Check `folder` against its manifest and return the manifest.

    `hashes=False` compares names and sizes only: enough to tell a complete folder from a torn one,
    without reading gigabytes. Raises TornFolder, and UnreadableFolder when the disk fails.
    """
    try:
        return _verify(folder, hashes)
    except OSError as error:
        name = error.filename or folder
        raise UnreadableFolder(f"{name} cannot be read ({error.strerror or error})") from error


def _verify(folder: Path, hashes: bool) -> dict:
    if not kinds.is_folder(folder):
        raise TornFolder(f"{folder} is no folder")
    content = _read(folder)
    for name, entry in content["files"].items():
        _check_file(folder, name, entry, hashes=hashes)
    _check_shards(folder, content["files"])
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        unlisted = name != NAME and name not in content["files"]
        if unlisted and path.suffix in LOADABLE and not kinds.is_folder(path):
            raise TornFolder(f"{name} is not in the manifest, yet a loader would read it")
    return content


def seal(content: dict) -> str:
    """The text of a manifest: `content` and its own sha256, so that a flipped bit shows."""
    body = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems cannot flush a folder; the rename is durable without it there.
        if error.errno != errno.EINVAL or not kinds.is_folder(path):
            raise
    finally:
        os.close(descriptor)


def _read(folder: Path) -> dict:
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
        content = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise TornFolder(f"{NAME} is missing") from None
    except (IsADirectoryError, ValueError, RecursionError) as error:
        raise TornFolder(f"{NAME} cannot be read ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise TornFolder(f"{NAME} lists no files")
    if content.get("format") != FORMAT:
        raise TornFolder(
            f"{NAME} has format {content.get('format')!r}; this version reads format {FORMAT}"
        )
    if text != seal(content):
        raise TornFolder(f"{NAME} is not what was saved")
    return content


def _check_file(folder: Path, name: str, entry: object, *, hashes: bool) -> None:
    if not _stays_inside(name):
        raise TornFolder(f"{NAME} names {name!r}, which lies outside the folder")
    if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
        raise TornFolder(f"{NAME} has no size and sha256 for {name}")
    path = folder / name
    if path.is_symlink():
        raise TornFolder(f"{name} is a link, not the file that was saved")
    if not kinds.is_file(path):
        raise TornFolder(f"{name} is missing")
    size, digest = path.stat().st_size, _sha256(path) if hashes else entry["sha256"]
    if size != entry["bytes"]:
        raise TornFolder(f"{name} has {size} bytes instead of {entry['bytes']}")
    if digest != entry["sha256"]:
        raise TornFolder(f"{name} is not what was saved (sha256 differs)")


def _check_shards(folder: Path, files: dict) -> None:
    """Every shard that an index sends a loader to must be a file of the manifest."""
    for name in files:
        if not name.endswith(".index.json"):
            continue
        try:
            index = json.loads((folder / name).read_text(encoding="utf-8"))
            shards = sorted(map(str, set(index["weight_map"].values())))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise TornFolder(f"{name} is not an index of shards ({error!r})") from None
        for shard in shards:
            path = str(PurePosixPath(name).parent / shard)
            if not _stays_inside(shard) or path not in files:
                raise TornFolder(f"{name} names the shard {shard!r}, which is not in the manifest")


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
