"""Which aborted completions a group goes on with, and that a checkpoint keeps them all."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from polymath_fast.config import Config
from polymath_fast.rollout import collect
from polymath_fast.rollout.partial import NOTHING, Pending
from polymath_fast.rollout.types import Completion, Drawn, Group, RolloutBatch
from polymath_fast.samples import Sample

ONE, TWO = Sample("q", "1", "p", (1, 2), {}), Sample("q2", "2", "p2", (3,), {})


def aborted(*token_ids, version=0):
    return Completion(
        token_ids=list(token_ids),
        sampling_logprobs=[-0.1 * (i + 1) for i in range(len(token_ids))],
        finish_reason="aborted",
        weight_version=version,
    )


def finished(*token_ids, version=0):
    return replace(aborted(*token_ids, version=version), finish_reason="stop")


def batch(*groups):
    return RolloutBatch(
        groups=[Group(sample=s, completions=[finished(9)], dropped=list(d)) for s, d in groups]
    )


def ids(completions):
    return [c.token_ids[0] for c in completions]


def test_groups_of_one_prompt_take_turns_and_nothing_is_lost():
    left = [aborted(i) for i in range(1, 8)]
    pending = NOTHING.after(batch((ONE, left[:4]), (ONE, left[4:]), (TWO, [aborted(50)])), 3)
    assert len(pending) == 8 and len(NOTHING) == 0
    shares = pending.shares([ONE, TWO, ONE], 3)
    assert [ids(share) for share in shares] == [[1, 3, 5], [50], [2, 4, 6]]
    after = pending.after(batch((ONE, [aborted(1, 8)]), (ONE, [])), 3)
    assert [ids(share) for share in after.shares([ONE, TWO], 3)] == [[7, 1], [50]]
    assert pending.shares([ONE, TWO, ONE], 3) == shares


def test_what_never_began_or_ended_late_is_not_kept():
    assert len(NOTHING.after(batch((ONE, [aborted(), finished(4)])), 3)) == 0


def test_a_checkpoint_keeps_every_bit():
    spans = ((2, 0), (5, 1))
    first = replace(
        aborted(7, 8, version=5), version_spans=spans, sampling_logprobs=[-1e-300, -3.3]
    )
    pending = NOTHING.after(batch((ONE, [first, aborted(4)]), (TWO, [aborted(5, 6, 7)])), 2)
    stored = json.loads(json.dumps(pending.to_json()))
    again = Pending.from_json(stored, 10)
    assert again.shares([ONE, TWO], 2) == pending.shares([ONE, TWO], 2)
    # with a shorter limit than before there may be nothing left to draw
    assert [ids(s) for s in Pending.from_json(stored, 2).shares([ONE, TWO], 2)] == [[4], []]


class Scripted:
    """Finishes the completions of a request from the last one to the first, up to `needed`."""

    def __init__(self):
        self.requests, self.closed = [], False

    def stream(self, requests, sampling):
        self.requests = requests
        try:
            for number, request in enumerate(requests):
                for index in reversed(range(request.n)):
                    count = request.n - index
                    done = finished(*[5] * count)
                    # two more than needed end at the same moment
                    kept = count <= request.needed + 2
                    yield Drawn(number, index, done if kept else aborted(*[6] * index))
        finally:
            self.closed = True


@pytest.mark.parametrize(("oversample", "asked"), [(0, 10), (0.1, 11), (0.25, 13), (2, 30)])
def test_the_number_asked_for_is_rounded_up(oversample, asked):
    assert Config(num_generations=10, oversample=oversample).asked_generations == asked


def test_a_group_is_what_finished_first_in_the_order_of_asking():
    config = Config(num_generations=4, groups_per_step=2, oversample=1.0)
    engine, told = Scripted(), []
    found = collect.sample_groups(
        engine, [ONE, TWO], 1, config, on_finished=lambda s, c: told.append((s, c))
    )
    assert [(r.n, r.needed) for r in engine.requests] == [(8, 4)] * 2
    for group in found.groups:
        assert [len(c.token_ids) for c in group.completions] == [4, 3, 2, 1]
        assert [c.finish_reason for c in group.dropped] == ["stop"] * 2 + ["aborted"] * 2
        group.rewards = [0.0, 1.0, 0.0, 1.0]
    assert [c for s, c in told if s is ONE] == found.groups[0].completions[::-1]
    metrics = collect.rollout_metrics(found, config)
    assert metrics["completion/mean_length"] == 2.5
    assert metrics["oversample/aborted"] == 4 and metrics["oversample/never_begun"] == 2
    # of each group: 1 to 6 tokens that finished, and one that was aborted after 1 token
    assert metrics["oversample/mean_length_at_least"] == (21 + 1) / 7
    assert not any(key.startswith("partial/") for key in metrics)
    assert not any("oversample" in key for key in collect.rollout_metrics(found, Config()))


def test_an_error_in_between_closes_the_stream():
    engine = Scripted()

    def interrupt(sample, completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect.sample_groups(engine, [ONE], 1, Config(), on_finished=interrupt)
    assert engine.closed


def test_stale_tokens_are_counted():
    config = Config(
        num_generations=4,
        oversample=0.5,
        partial_rollouts=True,
        importance_sampling_mode="token_truncate",
    )
    old = aborted(1, 2, 3, version=4).extended(finished(4, 5, version=7))
    fresh = [finished(1, version=7), finished(2, version=7), finished(3, 4, version=7)]
    group = Group(sample=ONE, completions=[old, *fresh], dropped=[aborted(1)], rewards=[0, 1, 0, 1])
    metrics = collect.rollout_metrics(RolloutBatch(groups=[group]), config)
    assert metrics["partial/continued"] == 1
    assert metrics["partial/stale_token_ratio"] == 3 / 9
    assert metrics["partial/stalest_token"] == 3
