"""Advantages of groups in Triton's interpreter.

`test_triton_interpreter.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import interpret

from polymath_fast.kernels.group_advantages import _triton as triton_advantages
from polymath_fast.kernels.group_advantages import reference as advantages

interpret()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("count", [0, 1, 77])
def test_group_advantages(scale, baseline, count) -> None:
    generator = torch.Generator().manual_seed(count)
    rewards = torch.randint(0, 3, (count,), generator=generator).float() / 3
    groups = torch.randint(0, 9, (count,), generator=generator)
    rewards[groups == 4] = 0.1
    rewards[::13] = torch.nan
    for eps in (0.0, 1e-4):
        ours = triton_advantages.group_advantages(rewards, groups, scale, eps, baseline)
        truth = advantages.group_advantages(rewards, groups, scale, eps, baseline)
        torch.testing.assert_close(ours, truth)
        assert (ours[(groups == 4) | rewards.isnan()] == 0).all()
