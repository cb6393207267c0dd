"""Several processes that are one run: the arithmetic of sharing, and one update of two processes
against the same update of one."""

from __future__ import annotations

import math
import random
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import learning_member
import pytest
import torch
from together import at_once

from polymath_fast.config import Config
from polymath_fast.errors import EngineError, UserError
from polymath_fast.evaluation.grading import EvalResult
from polymath_fast.processes.channel import Channel
from polymath_fast.processes.child import Child
from polymath_fast.ranks import ALONE, Leader, Member, Ranks, launch, member
from polymath_fast.ranks import ranks as ranks_module
from polymath_fast.ranks.alike import verify_alike
from polymath_fast.ranks.pooling import pooled, pooled_evaluation
from polymath_fast.rewards import RewardResult
from polymath_fast.rollout.types import Completion, Group, RolloutBatch
from polymath_fast.run import assembly
from polymath_fast.samples import Sample

SAMPLES = [
    Sample(problem=p, prompt=p, answer="1", prompt_ids=(number,), columns={})
    for number, p in enumerate(("first", "second"))
]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_parts_are_even_and_complete(count: int, size: int, tmp_path: Path) -> None:
    parts = [Leader([], size, tmp_path, "cpu").part(count)]
    parts += [Member(None, rank, size, tmp_path, "cpu").part(count) for rank in range(1, size)]
    assert sum(parts) == count and max(parts) - min(parts) <= 1
    assert parts == sorted(parts, reverse=True)


def test_alone_nothing_is_exchanged() -> None:
    assert ALONE.leads and ALONE.part(7) == 7 and ALONE.gather("x") == ["x"]
    tensor = torch.ones(3)
    ALONE.add(tensor)
    assert tensor.tolist() == [1, 1, 1]


def test_everybody_gets_everybodys_values_in_order(three: list[Ranks]) -> None:
    values = at_once(three, lambda ranks: ranks.gather({"rank": ranks.rank, "nan": math.inf}))
    assert values == [[{"rank": rank, "nan": math.inf} for rank in range(3)]] * 3
    assert at_once(three, lambda ranks: ranks.any(ranks.rank == 2)) == [True] * 3
    assert at_once(three, lambda ranks: ranks.any(False)) == [False] * 3
    assert [ranks.leads for ranks in three] == [True, False, False]


def test_sums_are_the_same_bytes_everywhere(three: list[Ranks]) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1003, generator=generator) for _ in three]
    sums = [tensor.clone() for tensor in given]
    for _ in range(2):
        at_once(three, lambda ranks: ranks.add(sums[ranks.rank]))
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
    torch.testing.assert_close(sums[0], 3 * sum(given))


BOUNDS = [0, 0, 700, 1003]


def test_a_part_of_the_sum_reaches_its_process(three: list[Ranks]) -> None:
    """The first one's is empty."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1003, generator=generator) for _ in three]
    sums = [tensor.clone() for tensor in given]
    at_once(three, lambda ranks: ranks.add_parts(sums[ranks.rank], BOUNDS))
    for rank, (first, last) in enumerate(zip(BOUNDS, BOUNDS[1:], strict=False)):
        torch.testing.assert_close(sums[rank][first:last], sum(given)[first:last])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parts_are_given_to_all(three: list[Ranks], dtype: torch.dtype) -> None:
    given = [torch.randn(1003).to(dtype) for _ in three]
    whole = torch.cat([t[a:b] for t, a, b in zip(given, BOUNDS, BOUNDS[1:], strict=False)])
    at_once(three, lambda ranks: ranks.share_parts(given[ranks.rank], BOUNDS))
    assert all(torch.equal(tensor, whole) for tensor in given)


def test_an_exchange_that_breaks_off_is_no_bug_of_ours(three: list[Ranks]) -> None:
    class Broken:
        def allreduce(self, tensors: list[torch.Tensor]) -> None:
            raise RuntimeError("Connection closed by peer")

    def work(ranks: Ranks) -> str:
        ranks._group = Broken()
        with pytest.raises(EngineError, match="exchange broke off: Connection closed") as error:
            ranks.add(torch.ones(1))
        return str(error.value)

    assert len(set(at_once(three, work))) == 1


def test_after_a_failure_all_come_to_one_place(three: list[Ranks]) -> None:
    """Whoever failed: here one in a gather, one that heard nothing of it yet, and the leader."""
    said: dict[int, str] = {}

    def work(ranks: Ranks) -> list[int]:
        try:
            if ranks.rank == 2:
                raise UserError("out of memory here")
            ranks.gather("before")
            ranks.gather("never answered")
        except (EngineError, UserError) as error:
            said[ranks.rank] = str(error)
            ranks.muster(error)
        return ranks.gather(ranks.rank)

    for _ in range(2):
        assert at_once(three, work) == [[0, 1, 2]] * 3
    assert "refused: out of memory here" in said[0] and said[1] == (
        "another process of this run failed"
    )
    leader, *members = three

    def leads(ranks: Ranks) -> list[int]:
        if ranks is leader:
            leader.muster(UserError("its own"))
        else:
            with pytest.raises(EngineError, match="another process of this run failed") as error:
                ranks.gather(None)
            ranks.muster(error.value)
        return ranks.gather(ranks.rank)

    assert at_once(three, leads) == [[0, 1, 2]] * 3


def test_who_does_not_come_is_named(three: list[Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    leader, member, other = three
    other._channel.close()  # while the first one is busy for long
    with pytest.raises(EngineError, match="process 2 of this run is lost .*gone"):
        leader.muster(EngineError("why"))
    monkeypatch.setattr(ranks_module, "_MUSTER", 0.05)
    leader._children.pop()
    with pytest.raises(EngineError, match=r"process 1 of this run is lost \(no answer for 0.05 s"):
        leader.muster(EngineError("why"))
    member._channel.close()


def test_a_process_that_is_gone_or_failed_is_an_error(three: list[Ranks]) -> None:
    leader, member, other = three
    member._channel.send("failed", reason="the engine died")
    with pytest.raises(EngineError, match="one of the 3 processes.*the engine died"):
        leader.gather(1)
    member._channel.close()
    with pytest.raises(EngineError, match="one of the 3 processes.*(ended|gone)"):
        leader.add(torch.ones(1))
    del other


def group(sample: Sample, rank: int, count: int) -> Group:
    """`count` completions that tell who drew them."""
    completions = [
        Completion(
            token_ids=[rank, sample.prompt_ids[0], index],
            sampling_logprobs=[-0.1 / 3, -1e-300, -math.pi],
            finish_reason="stop",
            weight_version=4,
        )
        for index in range(count)
    ]
    rewards = [None if index == 2 else rank + index / 10 for index in range(count)]
    return Group(
        sample=sample,
        completions=completions,
        dropped=[completions[0]] * rank,
        texts=[f"{sample.problem} {rank} {index}" for index in range(count)],
        rewards=rewards,
    )


def scores(batch: RolloutBatch, rank: int) -> RewardResult:
    total = [reward for group in batch.groups for reward in group.rewards]
    texts = [text for group in batch.groups for text in group.texts]
    return RewardResult(
        total=total,
        per_reward={"text": [hash(text) % 97 / 7 for text in texts]},
        metrics={"reward/excluded_ratio": float(rank)},
        notes=[f"note of {rank}"],
    )


def test_a_batch_is_put_together_alike_by_all(three: list[Ranks]) -> None:
    counts = {0: (3, 3), 1: (3, 2), 2: (2, 2)}
    recorded = object()

    def work(ranks: Ranks) -> tuple[RolloutBatch, RewardResult]:
        sizes = counts[ranks.rank]
        groups = [group(s, ranks.rank, n) for s, n in zip(SAMPLES, sizes, strict=True)]
        object.__setattr__(groups[1].completions[1], "recorded", recorded)
        batch = RolloutBatch(groups=groups)
        return pooled(ranks, batch, scores(batch, ranks.rank))

    (batch, result), *others = at_once(three, work)
    assert [len(each.completions) for each in batch.groups] == [8, 7]
    for number, each in enumerate(batch.groups):
        assert each.sample is SAMPLES[number]
        drawn = [(c.token_ids[0], c.token_ids[2]) for c in each.completions]
        assert drawn == [(r, i) for r in range(3) for i in range(counts[r][number])]
        assert [c.rank for c in each.completions] == [rank for rank, _ in drawn]
        assert each.texts == [f"{each.sample.problem} {r} {i}" for r, i in drawn]
        assert each.rewards == [None if i == 2 else r + i / 10 for r, i in drawn]
        assert [c.rank for c in each.dropped] == [1, 2, 2]
        assert all(
            c.sampling_logprobs == [-0.1 / 3, -1e-300, -math.pi] and c.weight_version == 4
            for c in each.completions
        )
    texts = [text for each in batch.groups for text in each.texts]
    assert result.total == [reward for each in batch.groups for reward in each.rewards]
    assert result.per_reward["text"] == [hash(text) % 97 / 7 for text in texts]
    assert result.metrics["reward/excluded_ratio"] == pytest.approx((0 * 6 + 1 * 5 + 2 * 4) / 15)
    assert result.notes == ["note of 0", "note of 1", "note of 2"]
    for rank, (same, alike) in enumerate(others, start=1):
        assert same.groups == batch.groups and alike == result
        kept = [c for c in same.groups[1].completions if c.recorded is recorded]
        assert [(c.rank, c.token_ids[2]) for c in kept] == [(rank, 1)]


def test_an_evaluation_is_put_together_in_the_order_of_its_problems(three: list[Ranks]) -> None:
    problems = list("abcde")

    def work(ranks: Ranks) -> EvalResult:
        mine = problems[ranks.rank :: ranks.size]
        rows = [
            {"index": i, "attempt": attempt, "problem": problem}
            for i, problem in enumerate(mine)
            for attempt in range(2)
        ]
        return pooled_evaluation(ranks, EvalResult(rows=rows, timeouts=ranks.rank))

    for result in at_once(three, work):
        found = [(row["index"], row["attempt"], row["problem"]) for row in result.rows]
        assert found == [(i, a, p) for i, p in enumerate(problems) for a in range(2)]
        assert result.timeouts == 3


SETTINGS = {
    "dapo": {},
    "gspo, several updates": {"loss_type": "gspo", "updates_per_batch": 3},
    "reference and entropy": {"beta": 0.1, "entropy_coef": 0.01, "loss_type": "grpo"},
    "truncated importance": {"importance_sampling_mode": "sequence_truncate"},
}


def some_rows() -> list[dict[str, Any]]:
    """Ragged, some equal, some with no advantage or no loss; a third is of rank 1."""
    draw = random.Random(5)
    rows = []
    for number in range(12):
        ids = [draw.randrange(50, 250) for _ in range(draw.randrange(1, 9))]
        rows.append(
            {
                "prompt_ids": [(5, 9, 17), (33, 70)][number % 2],
                "token_ids": ids,
                "sampling_logprobs": [-draw.uniform(4, 7) for _ in ids],
                "advantage": [1.5, -0.5, 0.0, -1.0][number % 4],
                "trained": number != 7,
                "rank": int(number % 3 == 1),
            }
        )
    return [*rows, rows[0], rows[1], rows[1] | {"rank": 0}]


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """A second process, which learns whatever it is told to."""
    started = Child("learning_member")
    yield started
    started.close(ask="close")


Learned = tuple[dict[str, float], torch.Tensor]


def learned_by_two(
    child: Child, model: Path, folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]]
) -> tuple[Learned, tuple[dict[str, float], float]]:
    """What this process learns, and what the other one says of it."""
    told = {"model": str(model), "settings": settings, "rows": rows, "folder": str(folder)}
    child.channel.send("start", rank=1, size=2, **told)
    leader = Leader([child], 2, folder, "cpu")
    found = learning_member.learned(str(model), settings, rows, leader)
    return found, tuple(child.channel.receive("value")["value"])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_two_processes_learn_what_one_does(
    tiny_model: Path, tmp_path: Path, child: Child, settings: dict[str, Any]
) -> None:
    settings = settings | {"learning_rate": 1e-3, "temperature": 0.8, "seed": 3}
    rows = some_rows()
    alone, expected = learning_member.learned(
        str(tiny_model), settings, [row | {"rank": 0} for row in rows]
    )
    (metrics, weights), (theirs, checksum) = learned_by_two(
        child, tiny_model, tmp_path, settings, rows
    )
    start = learning_member.Policy(tiny_model, dtype=torch.float32)
    moved = torch.cat([p.detach().flatten() for p in start.model.parameters()])
    assert float((expected - moved).norm()) > 0.1  # both updates did something
    # AdamW's first steps are the sign of the gradient: what cancels to noise moves anywhere
    assert float((weights - expected).norm() / (expected - moved).norm()) < 1e-3
    assert weights.double().sum().item() == checksum
    assert theirs == metrics and metrics.keys() == alone.keys()
    apart = {"packing/rows_saved_ratio", "packing/tree_used"}  # of each process's own rows
    for name in alone.keys() - apart:
        assert metrics[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize("name", ["dapo", "gspo, several updates"])
def test_a_sharded_optimizer_changes_no_bit(
    tiny_model: Path, tmp_path: Path, child: Child, name: str
) -> None:
    settings = SETTINGS[name] | {"learning_rate": 1e-3, "weight_decay": 0.1, "num_processes": 2}
    found = []
    for shard in (False, True):
        (tmp_path / str(shard)).mkdir()
        (metrics, weights), (theirs, checksum) = learned_by_two(
            child,
            tiny_model,
            tmp_path / str(shard),
            settings | {"shard_optimizer": shard},
            some_rows(),
        )
        assert theirs == metrics and weights.double().sum().item() == checksum
        found.append((metrics, weights))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_a_process_without_rows_takes_part(tiny_model: Path, tmp_path: Path, child: Child) -> None:
    rows = [row | {"rank": 0} for row in some_rows()]
    settings = {"learning_rate": 1e-3}
    (metrics, weights), (theirs, checksum) = learned_by_two(
        child, tiny_model, tmp_path, settings, rows
    )
    alone, expected = learning_member.learned(str(tiny_model), settings, rows)
    assert torch.equal(weights, expected) and weights.double().sum().item() == checksum
    assert metrics == alone and theirs == alone


def test_a_member_that_refuses_is_quoted(three: list[Ranks]) -> None:
    three[1]._channel.send("refused", reason="--dtype bfloat16 does not work here")
    with pytest.raises(UserError, match="--dtype bfloat16 does not work here"):
        three[0].gather(None)


def test_weights_that_went_apart_are_noticed() -> None:
    class Others(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, other or value]

    weights, other = torch.arange(7.0), None
    verify_alike(Others(), weights)
    other = [1]
    with pytest.raises(EngineError, match="process 1 are not those of process 0"):
        verify_alike(Others(), weights)


def test_the_group_is_left_while_its_meeting_place_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    quiet = SimpleNamespace(send=lambda *_, **__: None, close=lambda: seen.append("members end"))
    child = SimpleNamespace(channel=quiet, close=lambda **_: seen.append("they have ended"))
    monkeypatch.setattr(launch, "Child", lambda *_: child)
    with launch.launched(Config(num_processes=2), "cpu", tmp_path, None) as leader:
        folder, _ = leader._meeting
        leader._group = SimpleNamespace(abort=lambda: seen.append(f"left, {folder.is_dir()}"))
    assert seen == ["members end", "they have ended", "left, True"] and not folder.exists()


@pytest.mark.parametrize("ends", [None, UserError("no such thing")])
def test_a_member_leaves_the_group_however_its_run_ends(
    ends: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    seen: list[str] = []

    def train(settings: Config, invitation: member.Invitation) -> int:
        invitation.ranks._group = SimpleNamespace(abort=lambda: seen.append("left"))
        if ends is not None:
            raise ends
        return 0

    monkeypatch.setattr("polymath_fast.train.train", train)
    monkeypatch.setattr(member, "inherited", lambda descriptor: Channel(theirs, 20))
    with ours, theirs:
        about = {"rank": 1, "size": 2, "folder": str(tmp_path), "device": "cpu", "cores": []}
        told = {"config": {}, "run_dir": str(tmp_path), "checkpoint": None}
        Channel(ours, 20).send("start", **about, **told)
        assert member.main(0) == int(ends is not None)
    assert seen == ["left"]


def test_the_group_is_made_before_anything_is_sampled(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(Ranks):
        sums = 0

        def add(self, tensor: torch.Tensor) -> None:
            self.sums += 1

    monkeypatch.setattr(assembly, "launched", lambda *_: nullcontext(Watched()))
    config = Config(model=str(tiny_model), engine="transformers", output_dir=str(tmp_path / "run"))
    with assembly.build(config) as parts:
        assert parts.ranks.sums == 1
