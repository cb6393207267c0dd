"""TRL 1.16: `FastGRPOTrainer` in the place of `GRPOTrainer`, or `patch_trl()` for its kernels."""

from __future__ import annotations

from polymath_fast.integrations import require

VERSION = require(
    "trl", tested="1.16.0", accepted=("1.16.",), install="pip install 'polymath-fast[trl]'"
)

from polymath_fast.integrations.trl.patch import patch_trl  # noqa: E402
from polymath_fast.integrations.trl.trainer import FastGRPOTrainer  # noqa: E402

__all__ = ["FastGRPOTrainer", "patch_trl"]
