"""How a run asked its prompts, for those who ask its checkpoints later."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import Any

from polymath_fast.folders import step_folders

OF_PROMPTS = ("template", "instruction")
"""settings of a prompt's text; for an instruction, None is the usual one"""


def as_trained(checkpoint: Path) -> dict[str, Any]:
    """Settings of prompts and lengths of the run that saved `checkpoint`; None stands for what its
    run left out. Empty where this is no checkpoint in its run's folder."""
    if not step_folders.STEP.fullmatch(checkpoint.name):
        return {}
    try:
        text = (checkpoint.parent.parent / "config.toml").read_text(encoding="utf-8")
        settings = tomllib.loads(text)
    except (OSError, ValueError):
        return {}
    return {name: settings.get(name) for name in (*OF_PROMPTS, "max_completion_length")}


def as_flags(asked: dict[str, Any]) -> list[str]:
    """The flags that ask like this.

    >>> as_flags({"template": "plain", "instruction": "", "max_completion_length": None})
    ['--template', 'plain', '--instruction', '']
    """
    pairs = [("--" + name.replace("_", "-"), value) for name, value in asked.items()]
    return [str(word) for pair in pairs if pair[1] is not None for word in pair]


def difference(checkpoint: Path, settings: Any) -> str | None:
    """A sentence where `settings` (with template and instruction) ask in another way than the run
    that saved `checkpoint` did; else None."""
    trained = as_trained(checkpoint)
    ways = [
        {name: trained.get(name) for name in OF_PROMPTS},
        {name: getattr(settings, name) for name in OF_PROMPTS},
    ]
    if not trained or ways[0] == ways[1]:
        return None
    before, now = (shlex.join(as_flags(way)) for way in ways)
    return f"note: the run of this checkpoint asked with {before}, this evaluation with {now}"
