"""The `math` reward: 1.0 when the completion's answer equals the sample's, else 0.0."""

from __future__ import annotations

import threading
from collections import OrderedDict

from polymath_fast.errors import UserError
from polymath_fast.rewards.contract import RewardInput, Scores
from polymath_fast.rewards.equality import settle, unwrap
from polymath_fast.rewards.extraction import extract_answer
from polymath_fast.rewards.pool import Outcome, WorkerPool, cores

MEMORY_BYTES = 2**30
REMEMBERED_ANSWERS = 100_000
BUDGET_IN_TIMEOUTS = 12
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
        self._verdicts: OrderedDict[tuple[str, str], tuple[float, bool]] = OrderedDict()
        self._lock = threading.Lock()

    def score(self, batch: RewardInput) -> Scores:
        """One score per completion. Raises UserError when the samples have no answer."""
        golds = self._golds(batch)
        answers = [extract_answer(completion) for completion in batch.completions]
        return self.score_answers(answers, golds)

    def score_answers(self, answers: list[str | None], golds: list[str]) -> Scores:
        """Scores extracted answers; None (no answer found) scores 0."""
        pairs = [
            None if answer is None else (answer, gold)
            for answer, gold in zip(answers, golds, strict=True)
        ]
        unsettled: dict[tuple[str, str], None] = {}
        verdicts: dict[tuple[str, str], tuple[float, bool]] = {}
        for pair in {pair: None for pair in pairs if pair is not None}:
            known = self._recall(pair)
            equal = settle(*pair) if known is None else None
            if known is not None:
                verdicts[pair] = known
            elif equal is not None:
                verdicts[pair] = (float(equal), False)
            else:
                unsettled[pair] = None
        broken = self._verify(list(unsettled), verdicts)
        scores = Scores(values=[])
        for index, pair in enumerate(pairs):
            if pair is not None and pair in broken:
                scores.failures[index] = broken[pair]
                scores.values.append(None)
                continue
            value, cut_off = (0.0, False) if pair is None else verdicts[pair]
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
        return [unwrap(str(gold)) for gold in golds]

    def _verify(
        self,
        pairs: list[tuple[str, str]],
        verdicts: dict[tuple[str, str], tuple[float, bool]],
    ) -> dict[tuple[str, str], str]:
        """Adds the workers' verdicts to `verdicts`; returns the pairs that workers died of."""
        # cheap ones first: a batch full of traps must not use up the budget of honest answers
        pairs.sort(key=lambda pair: (sum(map(pair[0].count, _EXPENSIVE)), len(pair[0])))
        outcomes = self.pool.run(
            [{"answer": answer, "gold": gold} for answer, gold in pairs],
            self.timeout,
            budget=self.timeout * BUDGET_IN_TIMEOUTS,
        )
        broken = {}
        for pair, outcome in zip(pairs, outcomes, strict=True):
            if outcome.status == "died":
                broken[pair] = f"the verifier's worker process died ({outcome.detail})"
                continue
            verdicts[pair] = _verdict(outcome)
            self._remember(pair, verdicts[pair])
        return broken

    def _recall(self, pair: tuple[str, str]) -> tuple[float, bool] | None:
        with self._lock:
            if pair in self._verdicts:
                self._verdicts.move_to_end(pair)
            return self._verdicts.get(pair)

    def _remember(self, pair: tuple[str, str], verdict: tuple[float, bool]) -> None:
        with self._lock:
            self._verdicts[pair] = verdict
            while len(self._verdicts) > REMEMBERED_ANSWERS:
                self._verdicts.popitem(last=False)


def _verdict(outcome: Outcome) -> tuple[float, bool]:
    """(score, whether verification was cut off for its time or memory)."""
    if outcome.status == "timeout" or outcome.value == "memory":
        return 0.0, True
    return float(outcome.value == "equal"), False
