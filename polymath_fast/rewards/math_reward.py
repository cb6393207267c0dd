"""The `math` reward: 1.0 when the completion's answer equals the sample's, else 0.0."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from polymath_fast.errors import UserError
from polymath_fast.machine import cores
from polymath_fast.rewards.contract import RewardInput, Scores
from polymath_fast.rewards.equality import settle, unwrap
from polymath_fast.rewards.extraction import extract_answer
from polymath_fast.rewards.pool import Outcome, WorkerPool

MEMORY_BYTES = 2**30
REMEMBERED_ANSWERS = 100_000
BUDGET_IN_TIMEOUTS = 12
AHEAD_TIMEOUT = 1.0  # seconds for an answer that nobody waits for yet
Pair = tuple[str, str]
"""(answer, gold)"""
Verdict = tuple[float, bool]
"""(score, whether verification was cut off for its time or memory)"""
_EXPENSIVE = ("^", "!", r"\binom", r"\sum", r"\prod", r"\int", r"\lim", "matrix")


class MathReward:
    """Extracts the answer and compares it: as text, as number, then with math-verify in worker
    processes. Each distinct pair (answer, gold) is verified once and remembered."""

    name = "math"

    def __init__(self, timeout: float = 5.0) -> None:
        """`timeout`: seconds that one distinct answer may cost; a batch as a whole may cost 12
        times that. An answer that is cut off scores 0 and is counted."""
        self.timeout = timeout
        self.pool = WorkerPool(
            "polymath_fast.rewards._math_service",
            size=min(4, cores()),
            limits={"RLIMIT_AS": MEMORY_BYTES, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0},
        )
        self._verdicts: OrderedDict[Pair, Verdict] = OrderedDict()
        self._lock = threading.Lock()
        self._postponed: set[Pair] = set()

    def score(self, batch: RewardInput) -> Scores:
        """One score per completion. Raises UserError when the samples have no answer."""
        golds = self._golds(batch)
        answers = [extract_answer(completion) for completion in batch.completions]
        self._postponed.clear()
        return self.score_answers(answers, golds)

    def prepare(self, batch: RewardInput, stop: Callable[[], bool]) -> None:
        """Verifies answers ahead and remembers the verdicts.

        Only verdicts are kept: an answer that was cut off, or that a worker died of, is judged
        again by `score`, with its full time and while nothing else needs the processor.
        """
        pairs = zip(map(extract_answer, batch.completions), self._golds(batch), strict=True)
        distinct = dict.fromkeys((a, unwrap(gold)) for a, gold in pairs if a is not None)
        open_pairs = [
            pair
            for pair in distinct
            if pair not in self._postponed and self._cheap_verdict(*pair) is None
        ]
        open_pairs.sort(key=_expense)
        outcomes = self._ask(open_pairs, min(self.timeout, AHEAD_TIMEOUT), stop=stop)
        for pair, outcome in zip(open_pairs, outcomes, strict=True):
            if outcome.status == "ok":
                self._remember(pair, _verdict(outcome))
            else:
                self._postponed.add(pair)

    def score_answers(self, answers: Sequence[str | None], golds: Sequence[str]) -> Scores:
        """Scores extracted answers; None (no answer found) scores 0."""
        pairs = list(zip(answers, map(unwrap, golds), strict=True))
        distinct = {pair: None for pair in pairs if pair[0] is not None}
        verdicts = {pair: self._cheap_verdict(*pair) for pair in distinct}
        broken = self._verify(verdicts)
        scores = Scores(values=[])
        for index, pair in enumerate(pairs):
            if pair in broken:
                scores.failures[index] = broken[pair]
            value, cut_off = verdicts.get(pair) or (None if pair in broken else 0.0, False)
            scores.values.append(value)
            scores.timeouts += cut_off
        return scores

    def close(self) -> None:
        """Ends the worker processes."""
        self.pool.close()

    def _golds(self, batch: RewardInput) -> list[str]:
        golds = batch.columns.get("answer")
        if golds is None or any(gold is None for gold in golds):
            raise UserError(
                "the reward 'math' compares with the sample's answer, and a sample has none: "
                "give --answer, a dataset with an 'answer' column, or a --reward of your own"
            )
        return [str(gold) for gold in golds]

    def _cheap_verdict(self, answer: str, gold: str) -> Verdict | None:
        """The verdict where it is remembered or text and numbers decide, else None."""
        with self._lock:
            if (answer, gold) in self._verdicts:
                self._verdicts.move_to_end((answer, gold))
                return self._verdicts[answer, gold]
        equal = settle(answer, gold)
        return None if equal is None else (float(equal), False)

    def _verify(self, verdicts: dict[Pair, Verdict | None]) -> dict[Pair, str]:
        """Fills in the missing verdicts with the workers'; returns the pairs that workers died
        of, and how."""
        # cheap ones first: a batch full of traps must not use up the budget of honest answers
        pairs = sorted((pair for pair, known in verdicts.items() if known is None), key=_expense)
        outcomes = self._ask(pairs, self.timeout, budget=self.timeout * BUDGET_IN_TIMEOUTS)
        broken = {}
        for pair, outcome in zip(pairs, outcomes, strict=True):
            if outcome.status == "died":
                broken[pair] = f"the verifier's worker process died ({outcome.detail})"
            else:
                verdicts[pair] = _verdict(outcome)
                self._remember(pair, verdicts[pair])
        return broken

    def _ask(self, pairs: Sequence[Pair], timeout: float, **limits: Any) -> list[Outcome]:
        requests = [{"answer": answer, "gold": gold} for answer, gold in pairs]
        return self.pool.run(requests, timeout, **limits)

    def _remember(self, pair: Pair, verdict: Verdict) -> None:
        with self._lock:
            self._verdicts[pair] = verdict
            while len(self._verdicts) > REMEMBERED_ANSWERS:
                self._verdicts.popitem(last=False)


def _expense(pair: Pair) -> tuple[int, int]:
    answer = pair[0]
    return sum(map(answer.count, _EXPENSIVE)), len(answer)


def _verdict(outcome: Outcome) -> Verdict:
    if outcome.status == "timeout" or outcome.value == "memory":
        return 0.0, True
    return float(outcome.value == "equal"), False
