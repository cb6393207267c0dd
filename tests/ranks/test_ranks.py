"""What processes of one run exchange, and what happens when one of them fails, leaves or hangs."""

from __future__ import annotations

import math
import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from together import at_once

from polymath_fast.config import Config
from polymath_fast.errors import EngineError, UserError
from polymath_fast.processes.channel import Channel
from polymath_fast.ranks import ALONE, Leader, Member, Ranks, launch, member
from polymath_fast.ranks import ranks as ranks_module
from polymath_fast.run import assembly


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


def test_a_member_that_refuses_is_quoted(three: list[Ranks]) -> None:
    three[1]._channel.send("refused", reason="--dtype bfloat16 does not work here")
    with pytest.raises(UserError, match="--dtype bfloat16 does not work here"):
        three[0].gather(None)


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
