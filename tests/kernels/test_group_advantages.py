"""Group advantages against hand-computed numbers and torch.std."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from polymath_fast.kernels import group_advantages, use
from polymath_fast.kernels.group_advantages import BASELINES, SCALES

REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.5, 0.5, 2.0])


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with use(request.param):
        yield


def test_grpo_by_hand() -> None:
    # group 1: mean 1/3, deviations 2/3, -1/3, -1/3, std sqrt(1/3); group 2: mean 1, std sqrt(0.75)
    found = group_advantages(REWARDS, 3, eps=0.0)
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3]) / (1 / 3) ** 0.5
    assert_close(found[:3], expected)
    assert_close(found[3:], torch.tensor([-0.5, -0.5, 1.0]) / 0.75**0.5)


@pytest.mark.parametrize("eps", [1e-4, 1e-6])
def test_against_torch_std_for_interleaved_ids(eps: float) -> None:
    ids = torch.tensor([7, -2, 7, -2, 7, -2, -2])
    rewards = torch.rand(7)
    found = group_advantages(rewards, ids, eps=eps)
    for group in (7, -2):
        some = rewards[ids == group]
        assert_close(found[ids == group], (some - some.mean()) / (some.std() + eps))


def test_scales_and_baselines() -> None:
    plain = group_advantages(REWARDS, 3, scale="none")
    assert_close(plain, torch.tensor([2 / 3, -1 / 3, -1 / 3, -0.5, -0.5, 1.0]))
    assert_close(group_advantages(REWARDS, 3, scale="batch"), plain / (REWARDS.std() + 1e-4))
    others = group_advantages(REWARDS, 3, scale="none", baseline="leave_one_out")
    assert_close(others, torch.tensor([1.0, -0.5, -0.5, -0.75, -0.75, 1.5]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_equal_rewards_have_exactly_no_advantage(scale: str, eps: float) -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7])
    assert not group_advantages(rewards, 3, scale=scale, eps=eps).any()
    assert not group_advantages(torch.tensor([0.3]), 1, scale=scale, eps=eps).any()


def test_missing_rewards_take_no_part() -> None:
    nan = float("nan")
    found = group_advantages(torch.tensor([1.0, nan, 0.0, nan, nan, 5.0]), 3, eps=0.0)
    half = 0.5**0.5
    assert_close(found, torch.tensor([half, 0.0, -half, 0.0, 0.0, 0.0]))
    found = group_advantages(torch.tensor([1.0, nan, 0.0]), 3, scale="batch", eps=0.0)
    assert_close(found, torch.tensor([half, 0.0, -half]))


def test_dtypes_and_empty() -> None:
    assert group_advantages(torch.tensor([1, 0]).half(), 2).dtype == torch.float32
    assert group_advantages(torch.ones(2).double(), 2, impl="reference").dtype == torch.float64
    assert group_advantages(torch.empty(0), 4).shape == (0,)
    assert not group_advantages(torch.ones(2, requires_grad=True), 2).requires_grad


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_implementations_agree(count: int, dtype: torch.dtype) -> None:
    """Groups in order or not, of any size, with equal and with missing rewards."""
    rewards = torch.rand(count).to(dtype)
    missing = rewards.masked_fill(torch.rand(count) < 0.4, float("nan"))
    several = (torch.arange(count) // 3, torch.randint(-3, 4, (count,)), torch.zeros(count).long())
    choices = product((rewards, rewards.round(), missing), several, SCALES, BASELINES, (1e-4, 0.0))
    for values, groups, scale, baseline, eps in choices:
        options = {"scale": scale, "baseline": baseline, "eps": eps}
        truth = group_advantages(values, groups, **options, impl="reference")
        found = group_advantages(values, groups, **options, impl="cpu")
        assert_close(found, truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("rewards", "groups", "options", "message"),
    [
        (torch.ones(5), 2, {}, "divide the 5 rewards"),
        (torch.ones(5), 0, {}, "groups=0"),
        (torch.ones(2, 2), 2, {}, "rewards must be"),
        (torch.ones(4, dtype=torch.long), 2, {}, "rewards must be"),
        (torch.ones(4), torch.ones(3, dtype=torch.long), {}, "groups must be"),
        (torch.ones(4), torch.ones(4), {}, "groups must be"),
        (torch.ones(4), 2, {"scale": "std"}, "scale='std'"),
        (torch.ones(4), 2, {"baseline": "median"}, "baseline='median'"),
        (torch.ones(4), 2, {"eps": -1.0}, "eps=-1.0"),
        (torch.ones(4), 2, {"impl": "triton"}, "impl='triton'"),
    ],
)
def test_bad_input_is_refused(
    rewards: torch.Tensor, groups: torch.Tensor | int, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, groups, **options)
