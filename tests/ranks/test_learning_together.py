"""One update of two processes against the same update of one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import learning_member
import pytest
import torch

from polymath_fast.errors import EngineError
from polymath_fast.processes.child import Child
from polymath_fast.ranks import Leader, Ranks
from polymath_fast.ranks.alike import verify_alike

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


def test_weights_that_went_apart_are_noticed() -> None:
    class Others(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, other or value]

    weights, other = torch.arange(7.0), None
    verify_alike(Others(), weights)
    other = [1]
    with pytest.raises(EngineError, match="process 1 are not those of process 0"):
        verify_alike(Others(), weights)
