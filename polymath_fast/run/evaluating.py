"""Scores on held-out problems in the course of a run: what they are, and when they are due."""

from __future__ import annotations

import time

from polymath_fast.config import Config
from polymath_fast.folders import run_data
from polymath_fast.run.assembly import Parts


def evaluate(settings: Config, parts: Parts, step: int) -> None:
    """Score the held-out problems with the present weights and log the result."""
    from polymath_fast.evaluation.grading import evaluate_samples
    from polymath_fast.ranks.pooling import pooled_evaluation
    from polymath_fast.rollout.collect import derived_seed

    for name, held_out in parts.inputs.held_out.items():
        parts.monitor.phase(f"evaluate {name}")
        started = time.perf_counter()
        with parts.learner.lend():
            result = evaluate_samples(
                parts.engine,
                parts.inputs.tokenizer,
                held_out[parts.ranks.rank :: parts.ranks.size],
                k=settings.eval_k,
                temperature=settings.eval_temperature,
                max_completion_length=settings.max_completion_length,
                seed=derived_seed(settings.seed, parts.ranks.own(f"eval/{name}"), step),
                score=parts.inputs.rewards.score,
            )
        result = pooled_evaluation(parts.ranks, result)
        metrics = {f"eval/{name}/{key}": value for key, value in result.metrics().items()}
        metrics[f"time/eval/{name}"] = time.perf_counter() - started
        parts.monitor.log_step(step, metrics)


def owes_evaluation(settings: Config, parts: Parts) -> bool:
    """Whether an evaluation was due where the run begins or goes on, and is not recorded."""
    step = parts.steps_done
    asked = step == 0 or (step < settings.max_steps and due(step, settings.eval_every))
    return parts.ranks.leads and asked and not run_data.evaluated(parts.run_dir, step)


def due(step: int, every: int) -> bool:
    """Whether what happens `every` so many steps, never if that is 0, follows this step."""
    return every > 0 and step % every == 0
