"""Settings from the command line and from TOML files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, make_dataclass
from typing import Annotated, get_type_hints

from polymath_fast.config import Config, toml_flags
from polymath_fast.config.flag_values import joined, refuse_unreadable
from polymath_fast.config.settings import EMBEDDED_MODEL, SECTIONS
from polymath_fast.errors import UserError


def parse(args: Sequence[str] | None = None, prog: str = "python -m polymath_fast.train") -> Config:
    """Settings from the command line: defaults < --config left to right < flags.

    The preset cpu_demo takes the place of --config when there is none and the model is the embedded
    one. Raises UserError for an unknown flag or key, naming the nearest one, for a value of another
    kind, and for settings that cannot work.
    """
    args = list(sys.argv[1:] if args is None else args)
    configs = toml_flags.values_of("--config", args)
    models = toml_flags.values_of("--model", args)
    if not configs and models[-1:] in ([], [EMBEDDED_MODEL]):
        configs = ["cpu_demo"]
    kinds = get_type_hints(Config)
    toml_flags.refuse_unknown(args, [*kinds, "config"])
    hints = get_type_hints(Config, include_extras=True) | {"config": tuple[str, ...]}
    refuse_unreadable(args, hints)
    words: list[str] = []
    for name in configs:
        path = toml_flags.find(name)
        flags = toml_flags.read(path, kinds)
        try:
            refuse_unreadable(flags, hints)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        words += [*_displaced_source(flags), *flags]
    return Config(**_parse_flags([*words, *_displaced_source(args), *joined(args, hints)], prog))


def _displaced_source(words: Sequence[str]) -> list[str]:
    """Flags that undo an earlier choice of sample where `words` choose another kind of source."""
    question = toml_flags.values_of("--question", words)
    dataset = toml_flags.values_of("--dataset", words)
    if question and not dataset:
        return ["--dataset=None"]
    if dataset and not question:
        return ["--question=None", "--answer=None"]
    return []


def _parse_flags(words: Sequence[str], prog: str) -> dict[str, object]:
    """Let the parser read `words`; the sections become groups of --help, the flags stay flat."""
    import tyro

    sections = [
        (title, Annotated[section, tyro.conf.OmitArgPrefixes], section())
        for title, section in SECTIONS.items()
    ]
    source = (
        "config",
        Annotated[
            tuple[str, ...],
            tyro.conf.arg(
                help="TOML files or presets ("
                + ", ".join(sorted(path.stem for path in toml_flags.PRESETS.glob("*.toml")))
                + ") with these settings; later ones win, flags win over all; cpu_demo when there "
                "is none and the model is the embedded one"
            ),
        ],
        (),
    )
    parser = make_dataclass("Settings", [source, *sections], frozen=True, kw_only=True)
    parsed = tyro.cli(
        parser,
        args=words,
        prog=prog,
        description="Teach a language model from one sample, by reinforcement learning with a "
        "verifiable reward.",
    )
    return {
        field.name: getattr(getattr(parsed, title), field.name)
        for title, section in SECTIONS.items()
        for field in fields(section)
    }
