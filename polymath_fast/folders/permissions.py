"""Who may read the weights of a model folder."""

from __future__ import annotations

from pathlib import Path


def share_weights(folder: Path) -> None:
    """Give every .safetensors file below `folder` the permissions of its config.json: safetensors
    lets nobody but the owner read what it writes."""
    readers = (folder / "config.json").stat().st_mode
    for path in folder.rglob("*.safetensors"):
        path.chmod(readers)
