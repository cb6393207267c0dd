"""Another process that learns from its part of batches, as `python -m polymath_fast.ranks.member`
does from a run's: hears of them on its channel, says metrics and a checksum of its weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from polymath_fast.config import Config
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner
from polymath_fast.processes.child import inherited
from polymath_fast.ranks import ALONE, Member, Ranks


def rows_of(data: list[dict[str, Any]]) -> list[TrainingRow]:
    return [TrainingRow(**row | {"prompt_ids": tuple(row["prompt_ids"])}) for row in data]


def learned(
    model: str, settings: dict[str, Any], data: list[dict[str, Any]], ranks: Ranks = ALONE
) -> tuple[dict[str, float], torch.Tensor]:
    """Metrics of two updates, and the weights after them."""
    config = Config(**settings)
    reference = Policy(model, dtype=torch.float32) if config.beta else None
    learner = Learner(Policy(model, dtype=torch.float32), config, reference, ranks=ranks)
    learner.update(rows_of(data), 0)
    metrics = learner.update(rows_of(data), 1)
    return metrics, learner.optimizer.live.clone()


def main(descriptor: int) -> None:
    channel = inherited(descriptor)
    torch.set_num_threads(1)
    while True:
        start = channel.receive("start", "close")
        if start["kind"] == "close":
            return
        ranks = Member(channel, start["rank"], start["size"], Path(start["folder"]), "cpu")
        metrics, weights = learned(start["model"], start["settings"], start["rows"], ranks)
        channel.send("value", value=[metrics, weights.double().sum().item()])


if __name__ == "__main__":
    main(int(sys.argv[1]))
