"""Short runs of TRL's trainers with fixed rollouts, recorded for comparison."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.testing import assert_close

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

PROMPTS = ([5, 6, 7], [8, 9])
UNTIMED = ("time", "runtime", "per_second")


@dataclass
class Run:
    """What a training run did."""

    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """of each optimizer step, by parameter"""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def rollouts(vocab: int, eos: int, longest: int = 7, seed: int = 0):
    """A rollout_func: ragged completions, some ended by `eos`, with made-up sampler log-probs."""
    rng = random.Random(seed)

    def generate(prompts: list, trainer: Any) -> dict[str, Any]:
        completions = []
        for index in range(len(prompts)):
            length = rng.randint(2, longest)
            completion = [rng.randrange(10, vocab) for _ in range(length)]
            completions.append(completion if index % 3 == 0 else [*completion[:-1], eos])
        return {
            "prompt_ids": [PROMPTS[index // 4 % 2] for index in range(len(prompts))],
            "completion_ids": completions,
            "logprobs": [[-rng.uniform(5, 9) for _ in ids] for ids in completions],
            **({"env_mask": _env_mask(completions)} if trainer.args.run_name == "tools" else {}),
        }

    return generate


def _env_mask(completions: list[list[int]]) -> list[list[int]]:
    return [[0 if i % 4 == 2 else 1 for i in range(len(ids))] for ids in completions]


def train(
    trainer_class: type,
    model: Path | torch.nn.Module,
    folder: Path,
    *,
    sampled_by_vllm: bool = False,
    rollout_func: Any = None,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Two optimizer steps of four completions each in two micro-batches, on a CPU."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig

    run = Run()

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
            run.gradients.append(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )

    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "num_iterations": 2,
        "max_completion_length": 8,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "model_init_kwargs": None if isinstance(model, torch.nn.Module) else {"dtype": "float32"},
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    trainer = trainer_class(
        model=model if isinstance(model, torch.nn.Module) else str(model),
        reward_funcs=_reward,
        args=GRPOConfig(str(folder), **{**defaults, **options}),
        train_dataset=Dataset.from_dict({"prompt": ["one", "two"] * 4}),
        callbacks=[Recorder()],
        rollout_func=rollout_func,
        **(trainer_options or {}),
    )
    if sampled_by_vllm:  # TRL's correction of the sampler's log-probs, without an engine
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
    trainer.train()
    run.weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    run.history = trainer.state.log_history
    return run


def _reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] % 5) - 0.1 * len(ids) for ids in completion_ids]


def assert_same_run(ours: Run, theirs: Run, tolerance: float = 2e-5) -> None:
    """Gradients, weights, losses and every metric but the times."""
    assert len(ours.gradients) == len(theirs.gradients) == 2
    for step, gradients in enumerate(theirs.gradients):
        assert ours.gradients[step].keys() == gradients.keys()
        scale = max(float(g.abs().max()) for g in gradients.values())
        assert scale > 1e-3
        for name, gradient in gradients.items():
            assert _distance(ours.gradients[step][name], gradient) <= tolerance * scale, name
    for name, weight in theirs.weights.items():
        assert _distance(ours.weights[name], weight) <= tolerance, name
    for row, expected in zip(ours.history, theirs.history, strict=True):
        row, expected = _timeless(row), _timeless(expected)
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(row[name], value, rtol=20 * tolerance, atol=20 * tolerance, msg=name)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _timeless(row: dict[str, float]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in row.items()
        if value is not None and not any(word in name for word in UNTIMED)
    }
