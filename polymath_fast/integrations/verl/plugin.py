"""What verl's VERL_USE_EXTERNAL_MODULES takes: naming this module applies both parts of it."""

from __future__ import annotations

from polymath_fast.integrations.verl import patch_verl, register_losses

LOSSES = register_losses()
PATCH = patch_verl()
