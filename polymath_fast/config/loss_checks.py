"""Which settings of the loss fit together; see `checks`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polymath_fast.config.ranges import changed, flag
from polymath_fast.errors import UserError
from polymath_fast.kernels.loss_choices import DEPENDENT, NEEDED, READERS, formula, reads, takes

if TYPE_CHECKING:
    from polymath_fast.config import Config

_EXAMPLES = {
    "beta": "--beta 0.001",
    "importance_sampling_mode": "--importance-sampling-mode token_truncate",
}
"""flags that give the options of `DEPENDENT` a meaning"""


def check_loss(config: Config) -> None:
    """Raise UserError for the first setting of the loss that cannot work."""
    _check_unused(config)
    if NEEDED.get(formula(config.loss_type)) == "epsilon_high" and config.epsilon_high is None:
        raise UserError(
            f"--loss-type {config.loss_type} needs --epsilon-high, the largest ratio itself; "
            "5.0 works"
        )
    _check_correction(config)
    _check_saturation(config)


def _check_unused(config: Config) -> None:
    """The spec's own rules, for those of its options that are settings."""
    given = changed(config)
    for name in READERS:
        if name in given and not reads(config.loss_type, name):
            # the default loss reads every option that is a setting
            raise UserError(
                f"{flag(name)} is {getattr(config, name)}, which --loss-type {config.loss_type} "
                f"does not read; leave it out, or take --loss-type {type(config).loss_type}"
            )
    for name, other in DEPENDENT.items():
        if name in given and not getattr(config, other):
            raise UserError(
                f"{flag(name)} is {getattr(config, name)}, which nothing reads without "
                f"{flag(other)}; leave it out, or add {_EXAMPLES[other]}"
            )


def _check_correction(config: Config) -> None:
    mode = config.importance_sampling_mode
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    if mode is not None and low is None and math.isinf(high):
        raise UserError(
            f"--importance-sampling-mode {mode} needs a bound; --importance-sampling-clip-max 3 "
            "works"
        )
    if low is not None and low >= high:
        raise UserError(
            f"--importance-sampling-clip-min is {low:g}; it must be less than "
            f"--importance-sampling-clip-max ({high:g}); {high / 6:g} works"
        )
    if mode is not None and not takes(config.loss_type, mode):
        raise UserError(
            f"--importance-sampling-mode is {mode}, but --loss-type {config.loss_type} takes "
            "weights of tokens; token_truncate works"
        )


def _check_saturation(config: Config) -> None:
    for name, needed in (("max_resamples", "resample"), ("saturation_entropy_coef", "entropy")):
        value = getattr(config, name)
        default = type(config).__dataclass_fields__[name].default
        if value != default and config.on_saturation != needed:
            raise UserError(
                f"{flag(name)} is {value}, which nothing reads without --on-saturation {needed}; "
                "leave it out, or add that"
            )
    if config.on_saturation == "entropy" and not config.saturation_entropy_coef:
        raise UserError(
            "--saturation-entropy-coef is 0, so --on-saturation entropy would train nothing; "
            "0.001 works"
        )
    if config.on_saturation == "entropy" and config.entropy_coef:
        raise UserError(
            f"--on-saturation entropy has no effect with --entropy-coef {config.entropy_coef:g}, "
            "which trains the entropy of every batch; leave one of them out"
        )
