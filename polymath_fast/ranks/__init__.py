"""Several processes, one device each, that are one run.

Each of them samples its part of every group with an engine of its own and learns from what it
drew. Whatever is decided for the whole batch (advantages, divisors, whether to ask again) all of
them decide alike, from the same numbers; gradients add up. Between the processes go messages in
JSON, and the gradient through NCCL, or gloo on a CPU.
"""

from polymath_fast.ranks.ranks import ALONE, Leader, Member, Ranks

__all__ = ["ALONE", "Leader", "Member", "Ranks"]
