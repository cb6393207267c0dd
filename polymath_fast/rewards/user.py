"""A reward function of the user's own, called in a process of its own.

The code is trusted with the user's files, not with the run's life: a raise, a hang, os._exit, a
flood of output or of memory costs that process and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polymath_fast import machine
from polymath_fast.errors import UserError
from polymath_fast.rewards.contract import RewardInput, Scores
from polymath_fast.rewards.pool import Outcome, WorkerPool

LOAD_TIMEOUT = 300.0
LONGEST_CALL = 600.0
MAX_FAILED_SHARE = 0.2
RESERVED = ("prompts", "completions", "completion_ids")


class UserReward:
    """Calls `file.py:function` or `module:function` with TRL's arguments.

    When a call on a batch fails, the completions are scored one at a time, so that only those the
    function fails on are excluded. It should therefore treat completions independently.
    """

    def __init__(self, name: str, timeout: float = 5.0) -> None:
        """Loads the function in its process.

        Args:
            name: as given to --reward.
            timeout: seconds per completion; a call on n completions may take n times that, at
                most 600 seconds.
        Raises:
            UserError: nothing of that name can be loaded.
        """
        self.asked = name
        self.timeout = timeout
        module, _, function = name.rpartition(":")
        module = os.path.expanduser(module)
        # in metrics and tables a path would be noise, and its slashes would nest
        self.name = f"{Path(module).name}:{function}"
        if not module or not function.isidentifier():
            raise UserError(
                f"--reward {name}: give math, format, length, or a function of your own as "
                "file.py:function or module:function, e.g. my_reward.py:reward"
            )
        if module.endswith(".py") and not Path(module).is_file():
            raise UserError(f"--reward {name}: there is no file {Path(module).resolve()}")
        self.pool = WorkerPool(
            "polymath_fast.rewards._user_service",
            {"module": module, "function": function},
            limits={"RLIMIT_DATA": memory_limit(), "RLIMIT_CORE": 0},
            startup_timeout=LOAD_TIMEOUT,
        )
        self._accepted = self._load()

    def score(self, batch: RewardInput) -> Scores:
        """One score per completion. Raises UserError for a broken contract, and when more than a
        fifth of the completions cannot be scored."""
        longest = min(LONGEST_CALL, self.timeout * len(batch))
        request = self._request(batch)
        outcome = self.pool.run([request], longest)[0]
        trouble = self._trouble(outcome, longest)
        if trouble is None:
            return Scores(values=outcome.value["rewards"])
        if len(batch) == 1:
            return Scores(values=[None], failures={0: trouble})
        return self._one_at_a_time(batch)

    def prepare(self, batch: RewardInput, stop: Callable[[], bool]) -> None:
        """Nothing: the function is called with whole batches, as its author expects."""

    def close(self) -> None:
        """Ends the function's process."""
        self.pool.close()

    def _load(self) -> dict[str, Any]:
        greeting = self.pool.greet()
        if greeting.status != "ok":
            raise UserError(
                f"--reward {self.asked}: its process ended at import: {greeting.detail}"
            )
        if "error" in greeting.value:
            self.pool.close()
            raise UserError(f"--reward {self.asked}: {greeting.value['error']}")
        return greeting.value

    def _request(self, batch: RewardInput) -> dict[str, Any]:
        clash = [name for name in RESERVED if name in batch.columns]
        if clash:
            raise UserError(
                f"column {clash[0]!r} has the name of an argument of reward functions: rename it"
            )
        available = {
            "prompts": list(batch.prompts),
            "completions": list(batch.completions),
            "completion_ids": [list(ids) for ids in batch.completion_ids],
            **batch.columns,
        }
        missing = [name for name in self._accepted["required"] if name not in available]
        if missing:
            raise UserError(
                f"--reward {self.asked} asks for {missing[0]!r}, which no column has; there are: "
                f"{', '.join(available)}"
            )
        if not self._accepted["any"]:
            wanted = self._accepted["names"]
            available = {name: available[name] for name in wanted if name in available}
        arguments = {name: _plain(values, name) for name, values in available.items()}
        return {"arguments": arguments, "expected": len(batch)}

    def _trouble(self, outcome: Outcome, seconds: float) -> str | None:
        """Why the call gave no rewards, or None when it did."""
        if outcome.status == "timeout":
            return f"did not return within {seconds:g} s and was killed"
        if outcome.status == "died":
            return f"ended its process ({outcome.detail})"
        if "invalid" in outcome.value:
            raise UserError(f"--reward {self.asked} {outcome.value['invalid']}")
        if "failed" in outcome.value:
            return f"raised {outcome.value['failed']}"
        return None

    def _one_at_a_time(self, batch: RewardInput) -> Scores:
        scores = Scores(values=[])
        for index in range(len(batch)):
            single = self.score(batch.take(index))
            scores.values.extend(single.values)
            if single.failures:
                scores.failures[index] = single.failures[0]
            if len(scores.failures) > MAX_FAILED_SHARE * len(batch):
                raise UserError(
                    f"--reward {self.asked} failed on {len(scores.failures)} of {index + 1} "
                    f"completions; it {scores.failures[index]}. At most a fifth may fail: return "
                    "None or 0.0 for a completion that cannot be scored"
                )
        return scores


def memory_limit() -> int:
    """Bytes a reward function's process may allocate: half of the machine's memory."""
    return machine.memory_bytes() // 2


def _plain(values: Sequence[Any], column: str) -> list[Any]:
    return [_plain_value(value, column) for value in values]


def _plain_value(value: Any, column: str) -> Any:
    """`value` as JSON can carry it: numpy arrays and scalars as lists and numbers, dates as
    text."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain_value(item, column) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_value(item, column) for item in value]
    if hasattr(value, "tolist"):
        return _plain_value(value.tolist(), column)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise UserError(
        f"column {column!r} holds a {type(value).__name__}, which cannot be passed to a reward "
        "function: use text, numbers, lists or tables of them"
    )
