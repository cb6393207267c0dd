"""Scoring while others are still sampled gives what scoring at the end gives."""

from __future__ import annotations

import threading
import time

import pytest

from polymath_fast.errors import UserError
from polymath_fast.rewards import RewardSet, Scores
from polymath_fast.rewards.math_reward import MathReward
from polymath_fast.rewards.pool import WorkerPool
from polymath_fast.rollout.scoring import Scorer
from polymath_fast.rollout.types import Completion, Group, RolloutBatch
from polymath_fast.samples import Sample


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode()


class Watching:
    """A reward that notes how it is called."""

    name = "watching"

    def __init__(self, fail=None):
        self.prepared, self.batches = [], []
        self.fail = fail
        self.seen = threading.Event()

    def prepare(self, batch, stop):
        self.prepared += batch.completions
        self.seen.set()
        if self.fail:
            raise self.fail

    def score(self, batch):
        self.batches.append(list(batch.completions))
        return Scores(values=[float(len(text)) for text in batch.completions])

    def close(self):
        pass


def completion(text):
    ids = list(text.encode())
    return Completion(
        token_ids=ids, sampling_logprobs=[-1.0] * len(ids), finish_reason="stop", weight_version=0
    )


def sample(answer, **columns):
    return Sample("q", answer, "p", (1, 2), columns)


def batch_of(*groups):
    return RolloutBatch(
        groups=[Group(sample=s, completions=[completion(t) for t in texts]) for s, texts in groups]
    )


def score(rewards, batch, early=()):
    """Score `batch`, of which the completions at the flat places `early` finish first."""
    owners = [group.sample for group in batch.groups for _ in group.completions]
    prepare, done = rewards.prepare, []

    def noted(some, stop):
        prepare(some, stop)
        done.extend(some.completions)

    rewards.prepare = noted
    with Scorer(rewards, Bytes()) as scorer:
        for place in early:
            scorer.add(owners[place], batch.completions[place])
        deadline = time.monotonic() + 60
        while len(done) < len(early) and scorer._thread.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        result = scorer.score(batch)
    assert not scorer._thread.is_alive()
    return result, scorer


def mathematics():
    answers = ("12", "3*4", "x+1", "1+x", r"\frac{24}{2}", "7", "12")
    texts = [rf"\boxed{{{answer}}}" for answer in answers]
    return batch_of((sample("12"), [*texts, "no answer"]), (sample("x+1"), texts))


def test_math_is_judged_as_at_the_end_and_only_once(monkeypatch):
    asked = []
    run = WorkerPool.run

    def spy(self, requests, *args, **options):
        asked.extend((r["answer"], r["gold"]) for r in requests)
        return run(self, requests, *args, **options)

    monkeypatch.setattr(WorkerPool, "run", spy)
    with RewardSet([MathReward()]) as rewards:
        expected, _ = score(rewards, mathematics())
    at_the_end, asked[:] = list(asked), []
    with RewardSet([MathReward()]) as rewards:
        batch = mathematics()
        found, scorer = score(rewards, batch, early=[14, 3, 0, 2, 9, 1, 4])
    assert found == expected
    assert [r for group in batch.groups for r in group.rewards] == expected.total
    assert expected.total[:8] == [1, 1, 0, 0, 1, 0, 1, 0] and expected.total[10:12] == [1, 1]
    assert sorted(asked) == sorted(at_the_end) and len(set(asked)) == len(asked) > 2
    assert scorer.overlapped > 0


def test_a_reward_gets_the_whole_batch_in_order_whatever_finished_first():
    watching = Watching()
    batch = batch_of((sample("1", topic="a"), ["one", "three"]), (sample("2"), ["five", "six"]))
    result, _ = score(RewardSet([watching]), batch, early=[3, 0])
    assert watching.batches == [["one", "three", "five", "six"]]
    assert sorted(watching.prepared) == ["one", "six"]
    assert result.total == [3, 5, 4, 3]
    assert [group.texts for group in batch.groups] == [["one", "three"], ["five", "six"]]


def test_an_answer_that_is_slow_ahead_gets_its_full_time_at_the_end(monkeypatch):
    """Only what was judged ahead is remembered: no timeout, and no death of a worker."""
    calls = []

    def run(self, requests, timeout, *, budget=None, stop=None):
        from polymath_fast.rewards.pool import Outcome

        calls.append(([r["answer"] for r in requests], timeout, budget))
        if budget is None:
            slow = [Outcome("timeout"), Outcome("died", detail="exit code 7")]
            return [slow.pop() if "2^" in r["answer"] else Outcome("ok", "equal") for r in requests]
        return [Outcome("ok", "equal") for _ in requests]

    monkeypatch.setattr(WorkerPool, "run", run)
    texts = [r"\boxed{2^{x}}", r"\boxed{2^{y}}", r"\boxed{y+z}", r"\boxed{a+b}"]
    batch = batch_of((sample("z+y"), texts))
    result, _ = score(RewardSet([MathReward(timeout=5)]), batch, early=[0, 1, 2])
    assert result.total == [1, 1, 1, 1] and result.metrics["reward/timeout_ratio"] == 0
    *ahead, (answers, timeout, budget) = calls
    assert all(each[1:] == (1.0, None) for each in ahead)
    assert (timeout, budget) == (5, 60)
    assert sorted(answers) == ["2^{x}", "2^{y}", "a+b"]


def test_what_goes_wrong_ahead_is_raised_when_the_batch_is_scored():
    watching = Watching(fail=UserError("a sample has no answer"))
    with pytest.raises(UserError, match="a sample has no answer"):
        score(RewardSet([watching]), batch_of((sample("1"), ["one", "two"])), early=[1])


def test_an_error_of_the_sampler_is_not_kept_waiting():
    release, watching = threading.Event(), Watching()
    watching.prepare = lambda batch, stop: (watching.seen.set(), release.wait(30))
    with pytest.raises(KeyboardInterrupt), Scorer(RewardSet([watching]), Bytes()) as scorer:
        scorer.add(sample("1"), completion("one"))
        assert watching.seen.wait(30)
        raise KeyboardInterrupt
    assert scorer._thread.is_alive() and scorer._thread.daemon
    release.set()
    scorer._thread.join(30)
    assert not scorer._thread.is_alive() and not watching.batches
