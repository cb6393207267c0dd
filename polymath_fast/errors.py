"""The kinds of failure a run can end with."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend. The message names the value, the rule and a value that works.

    Every command prints it on one line and exits with code 2.
    """


class OutOfMemory(UserError):
    """The learner ran out of memory; its weights are still good. Names the setting to change."""


class EngineError(RuntimeError):
    """The rollout engine died or broke its contract. The learner's state is still good."""
