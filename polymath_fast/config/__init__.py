"""Every setting of a training run: one flat, frozen dataclass, whose fields are the flags.

Importing this loads neither torch nor the parser.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from polymath_fast.config import checks
from polymath_fast.config.settings import (
    DEFAULT_SAMPLE,
    SECTIONS,
    EvaluationSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    RewardSettings,
    RolloutSettings,
    RunSettings,
    SampleSettings,
)


@dataclass(frozen=True, kw_only=True)
class Config(
    EvaluationSettings,
    RunSettings,
    OptimizerSettings,
    LossSettings,
    RewardSettings,
    RolloutSettings,
    SampleSettings,
    ModelSettings,
):
    """All settings of a run. Raises UserError when one cannot work or two do not fit together."""

    def __post_init__(self) -> None:
        checks.check(self)
        if self.question is None and self.dataset is None:
            object.__setattr__(self, "dataset", DEFAULT_SAMPLE)

    @property
    def asked_generations(self) -> int:
        """Completions that are asked for per group, with those of --oversample."""
        # rounded first: 10 x 1.1 is a little more than 11
        return math.ceil(round(self.num_generations * (1 + self.oversample), 6))

    def of_one_process(self) -> Config:
        """What one of `num_processes` does of a step, at most."""
        count = self.num_processes
        if count == 1:
            return self
        share = -(-self.num_generations // count)
        return replace(
            self,
            num_processes=1,
            shard_optimizer=False,
            num_generations=share,
            num_train_generations=None,
            updates_per_batch=min(self.updates_per_batch, share * self.groups_per_step),
        )

    def to_toml(self) -> str:
        """The settings as TOML that --config reads back into an equal Config.

        Settings that are None are left out, for TOML has no null and None is always the default.
        """
        import tomli_w

        from polymath_fast import __version__

        values = asdict(self)
        text = f"# every setting of a run of polymath_fast {__version__}\n"
        for title, section in SECTIONS.items():
            present = {f.name: values[f.name] for f in fields(section)}
            present = {name: value for name, value in present.items() if value is not None}
            text += f"\n# {title}\n{tomli_w.dumps(present)}"
        return text

    def write(self, path: Path) -> None:
        """Write `to_toml()` to `path`, whole or not at all."""
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(self.to_toml(), encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
