"""Rewards: built-in ones by name, the user's own by file or module. Imports neither torch nor
sympy; what they need runs in worker processes."""

from __future__ import annotations

from polymath_fast.rewards.contract import Reward, RewardInput, Scores
from polymath_fast.rewards.results import RewardCheck, RewardResult
from polymath_fast.rewards.reward_set import RewardSet, build

__all__ = ["Reward", "RewardCheck", "RewardInput", "RewardResult", "RewardSet", "Scores", "build"]
