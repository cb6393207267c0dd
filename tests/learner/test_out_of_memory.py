"""Out of memory names the setting to change, and leaves the weights good."""

from __future__ import annotations

import pytest
import torch

from polymath_fast.config import Config
from polymath_fast.errors import OutOfMemory
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner


def rows(count, length=8):
    return [
        TrainingRow(
            prompt_ids=(1, 2, 3),
            token_ids=[*range(i, i + length)],
            sampling_logprobs=[-5.0] * length,
            advantage=1.0,
        )
        for i in range(count)
    ]


def refuse(kind):
    def allocate(*_):
        if kind == "cpu":
            return torch.empty(2**60, dtype=torch.uint8)  # torch's own error
        raise {"gpu": torch.OutOfMemoryError("CUDA out of memory"), "python": MemoryError()}[kind]

    return allocate


@pytest.fixture
def learner(tiny_model):
    return lambda **settings: Learner(
        Policy(tiny_model), Config(max_completion_length=10, **settings)
    )


@pytest.mark.parametrize("kind", ["cpu", "gpu", "python"])
def test_every_kind_of_refusal_is_recognised(learner, kind):
    made = learner()
    before = made.optimizer.live.clone()
    made.policy.hidden = refuse(kind)
    with pytest.raises(OutOfMemory) as error:
        made.update(rows(10), 0)
    # 3 + 10 x 7 tokens at once; half of them are more than a prompt and a completion
    for part in ("73 tokens", "--tokens-per-microbatch 36 or --gradient-checkpointing"):
        assert part in str(error.value)
    assert torch.equal(made.optimizer.live, before)


def test_what_was_gathered_before_is_forgotten(learner):
    made = learner(tokens_per_microbatch=40)
    hidden, calls = made.policy.hidden, []

    def second_fails(*args):
        calls.append(1)
        return hidden(*args) if len(calls) == 1 else refuse("cpu")()

    made.policy.hidden = second_fails
    with pytest.raises(OutOfMemory):
        made.update(rows(10), 0)
    assert len(calls) == 2 and made.optimizer.grad.count_nonzero() == 0


@pytest.mark.parametrize(
    ("count", "settings", "advice"),
    [
        (10, {"gradient_checkpointing": True}, "with --tokens-per-microbatch 36"),
        (2, {"gradient_checkpointing": True}, "with --tokens-per-microbatch 13"),
        (1, {}, "with --gradient-checkpointing"),
        (1, {"gradient_checkpointing": True}, "with --offload-optimizer$"),
        (
            1,
            {"gradient_checkpointing": True, "offload_optimizer": True},
            "with --max-completion-length 5$",
        ),
        (10, {"tokens_per_microbatch": 40}, "38 tokens"),
        (
            1,
            {"gradient_checkpointing": True, "num_processes": 2},
            "go on with --shard-optimizer or --offload-optimizer$",
        ),
        (
            1,
            {"gradient_checkpointing": True, "num_processes": 2, "shard_optimizer": True},
            "go on with --offload-optimizer$",
        ),
    ],
)
def test_the_advice_can_be_followed(learner, count, settings, advice):
    made = learner(**settings)
    made.policy.hidden = refuse("cpu")
    with pytest.raises(OutOfMemory, match=advice):
        made.update(rows(count), 0)


def test_other_errors_keep_their_name(learner):
    made = learner()
    made.policy.hidden = lambda *_: torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError, match="inconsistent tensor size|size mismatch"):
        made.update(rows(2), 0)
