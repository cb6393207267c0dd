"""Which settings of the loss fit together; see `checks`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polymath_fast.config.ranges import flag
from polymath_fast.errors import UserError

if TYPE_CHECKING:
    from polymath_fast.config import Config

_CLIPPED = ("dapo", "grpo", "gspo", "bnpo", "dr_grpo", "luspo")
_TRUST_REGION = (*_CLIPPED, "cispo_two_sided", "geo_mean", "dppo_tv", "dppo_kl")
_LOSS_OPTIONS = {
    "epsilon": _TRUST_REGION,
    "epsilon_high": (*_TRUST_REGION, "cispo"),
    "delta": _CLIPPED,
}
"""option -> the loss types that read it"""


def check_loss(config: Config) -> None:
    """Raise UserError for the first setting of the loss that cannot work."""
    for name, readers in _LOSS_OPTIONS.items():
        value = getattr(config, name)
        if value != type(config).__dataclass_fields__[name].default and (
            config.loss_type not in readers
        ):
            raise UserError(
                f"{flag(name)} is {value}, which --loss-type {config.loss_type} does not read; "
                f"leave it out, or take --loss-type {readers[0]}"
            )
    if config.loss_type == "cispo" and config.epsilon_high is None:
        raise UserError(
            "--loss-type cispo needs --epsilon-high, the largest ratio itself; 5.0 works"
        )
    if config.kl_estimator != type(config).kl_estimator and not config.beta:
        raise UserError(
            f"--kl-estimator is {config.kl_estimator}, which nothing reads without --beta; "
            "leave it out, or add --beta 0.001"
        )
    upper = 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    if config.delta is not None and config.delta <= upper:
        raise UserError(
            f"--delta is {config.delta}; it bounds ratios above the clip range, so it must be "
            f"greater than {upper:g} (1 + epsilon); {upper + 2:g} works"
        )
    _check_correction(config)
    _check_saturation(config)
    if config.warmup_steps >= config.max_steps:
        raise UserError(
            f"--warmup-steps is {config.warmup_steps} of {config.max_steps} steps, so the learning "
            f"rate would never be reached; it must be less than --max-steps; 0 works"
        )


def _check_correction(config: Config) -> None:
    mode = config.importance_sampling_mode
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    for name in ("importance_sampling_clip_max", "importance_sampling_clip_min"):
        value = getattr(config, name)
        if mode is None and value != type(config).__dataclass_fields__[name].default:
            raise UserError(
                f"{flag(name)} is {value}, which nothing reads without --importance-sampling-mode; "
                "leave it out, or add --importance-sampling-mode token_truncate"
            )
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
    if config.loss_type == "vespo" and (mode or "").startswith("sequence"):
        raise UserError(
            f"--importance-sampling-mode is {mode}, but --loss-type vespo takes weights of tokens; "
            "token_truncate works"
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
