"""Checkpoints: a plain Hugging Face folder plus the trainer's state, saved whole or not at all.

    checkpoints/step_000010/
        config.json, model.safetensors, tokenizer ...   what transformers and vLLM load
        trainer/state.safetensors                       optimizer tensors
        trainer/state.json                              updates, model identity, pending completions
        manifest.json                                   sizes and sha256 of all of the above

A save writes a tmp_* folder next to its final place, flushes it to disk, and renames it: a kill, a
full disk or a failing one at any moment leaves the earlier checkpoints as they were. Nothing is
pickled: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polymath_fast.errors import UserError
from polymath_fast.folders import manifest, step_folders, tensor_file
from polymath_fast.folders.permissions import share_weights

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "checkpoints"
_IO_ERROR = re.compile(r"I/?O error|os error (\d+)", re.IGNORECASE)
# The part of a model's config.json that fixes the shapes and names of its weights.
_SHAPE_KEYS = (
    *("model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]
    """what was given to `save` as trainer_state"""

    def tensors(self) -> dict[str, Tensor]:
        """The trainer's tensors, on the CPU, in the dtypes they were saved in."""
        from safetensors.torch import load_file

        return load_file(self.path / "trainer" / "state.safetensors")

    @contextmanager
    def slices(self) -> Iterator[dict[str, Any]]:
        """Inside, what `tensors` gives, but read from the disk slice by slice."""
        from safetensors import safe_open

        with safe_open(self.path / "trainer" / "state.safetensors", framework="pt") as file:
            yield {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118

    def require_model(self, identity: Mapping[str, Any]) -> None:
        """Raise UserError unless the run that saved this trained the model of `identity`.

        `identity` comes from `model_identity`; the saved one is `state["model"]`.
        """
        saved = self.state.get("model") or {"name": "an unnamed model", "shape": None}
        same_name = Path(saved["name"]).name == Path(identity["name"]).name
        if same_name and saved["shape"] == identity["shape"]:
            return
        saved_shape, shape = saved["shape"] or {}, identity["shape"]
        differing = [
            f"{key} {saved_shape.get(key)} / {shape.get(key)}"
            for key in _SHAPE_KEYS
            if saved_shape.get(key) != shape.get(key)
        ]
        why = f" ({', '.join(differing[:3])})" if differing else ""
        raise UserError(
            f"--resume {self.path} holds a run of {saved['name']}, not of {identity['name']}{why}; "
            f"pass --model {saved['name']} to continue it, or choose a new --output-dir to train "
            f"{identity['name']}"
        )


class Shared(NamedTuple):
    """(elements,) float32 tensors `names` that no process has as a whole."""

    names: tuple[str, ...]
    elements: int
    fill: Callable[[Path, dict[str, int]], None]
    """writes them, checked by `require_finite`, into the file, where each begins at that byte"""


def model_identity(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `trainer_state["model"]` must hold: the model's name and the shape of its weights.

    `config` is the parsed config.json. A local folder may move: only its last part is compared.
    """
    return {"name": name, "shape": {key: config[key] for key in _SHAPE_KEYS if key in config}}


def save(
    run_dir: Path,
    step: int,
    *,
    model_files: Callable[[Path], None],
    trainer_tensors: Mapping[str, Tensor],
    trainer_state: Mapping[str, Any],
    keep: int,
    shared: Shared | None = None,
) -> Path:
    """Write checkpoints/step_N, then drop all but the newest `keep`; returns its path.

    `model_files(folder)` writes the Hugging Face folder. `trainer_tensors` are contiguous and share
    no memory; with `shared` further tensors are filled in; `trainer_state` is JSON. Checkpoints
    past `step` come from a future that the run resumed from before, and go too. Raises UserError
    when the disk fails or a weight is not finite; the earlier checkpoints are then untouched.
    """
    if keep < 1:
        raise UserError(f"--keep-checkpoints {keep}: at least 1 checkpoint must be kept; use 2")
    require_finite(trainer_tensors.items(), step)
    root = Path(run_dir) / FOLDER
    temporary = step_folders.temporary(root, step)
    try:
        temporary.mkdir(parents=True)
        _write(temporary, model_files, trainer_tensors, trainer_state, step, shared)
        final = step_folders.publish(temporary, step)
    except Exception as error:
        reason = _disk_failure(error)
        if reason is None:
            raise
        left = "earlier checkpoints are intact; " if step_folders.steps(root) else ""
        after = "go on with --resume auto" if left else "start again"
        raise UserError(
            f"checkpoint of step {step} could not be written to {root} ({reason}); {left}make room "
            f"or repair the disk, then {after}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    step_folders.rotate(root, step, keep)
    return final


def load(folder: Path, step: int) -> Checkpoint:
    """The checkpoint in `folder`, verified byte for byte. Raises manifest.TornFolder for one that
    is not what was saved as `step`."""
    content = manifest.verify(folder)
    if content.get("step") != step:
        raise manifest.TornFolder(f"it was saved as step {content.get('step')!r}")
    needed = {"config.json", "trainer/state.safetensors", "trainer/state.json"}
    if missing := needed - content["files"].keys():
        raise manifest.TornFolder(f"{min(missing)} is not in the manifest")
    state = json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(path=folder, step=step, state=state)


def sweep(run_dir: Path) -> list[Path]:
    """Remove what killed saves left behind; call it only while holding the folder's RunLock."""
    return step_folders.sweep(Path(run_dir) / FOLDER)


def _write(
    folder: Path,
    model_files: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    step: int,
    shared: Shared | None,
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    model_files(folder)
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            require_finite(((name, file.get_tensor(name)) for name in file.keys()), step)  # noqa: SIM118
    trainer = folder / "trainer"
    trainer.mkdir()
    path = trainer / "state.safetensors"
    if shared is None:
        save_file(dict(tensors), path)
    else:
        shared.fill(path, tensor_file.lay_out(path, shared.names, shared.elements, tensors))
    text = json.dumps(state, indent=1, allow_nan=False)
    (trainer / "state.json").write_text(text + "\n", encoding="utf-8")
    share_weights(folder)
    manifest.write(folder, step=step)


def require_finite(tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Raise UserError for the first tensor that must not be saved as of `step`."""
    for name, tensor in tensors:
        if not _is_finite(tensor):
            raise UserError(
                f"checkpoint of step {step} refused: {name} holds NaN or Inf; the earlier "
                "checkpoints are intact: go on from them with --resume auto and a lower "
                "--learning-rate, for example half of it"
            )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    tensor = tensor.detach()
    # NaN and Inf survive a sum, which needs no mask of the tensor's size; only a sum of large
    # finite values can overflow, and then each value is looked at, in pieces.
    if bool(tensor.sum().isfinite()):
        return True
    return all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(1 << 24))


def _disk_failure(error: Exception) -> str | None:
    """The reason in words when `error` is the disk's, None when it is a bug."""
    from safetensors import SafetensorError

    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors writes in Rust and reports the system's error as text.
    if isinstance(error, SafetensorError) and (found := _IO_ERROR.search(str(error))):
        number = re.search(r"os error (\d+)", str(error))
        return os.strerror(int(number[1])) if number else found[0]
    return None
