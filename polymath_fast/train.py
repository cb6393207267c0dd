"""python -m polymath_fast.train: reinforcement learning with verifiable reward from one sample.

The loop below is the whole algorithm: ask one prompt many times, score the answers, compare each
with its group, take one gradient step, hand the weights to the sampler. `--help` lists the flags.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, where Ctrl-C would be a traceback
    from polymath_fast import start

    start.run("polymath_fast.train")

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from polymath_fast.config import Config
from polymath_fast.config.command_line import parse
from polymath_fast.errors import EngineError, UserError
from polymath_fast.monitor import peak_memory_gib
from polymath_fast.monitor.clock import Clock
from polymath_fast.monitor.console import print_error, say
from polymath_fast.rewards import RewardResult
from polymath_fast.rollout.types import RolloutBatch
from polymath_fast.run import assembly, saturation
from polymath_fast.run.assembly import Parts
from polymath_fast.run.evaluating import due, evaluate, owes_evaluation
from polymath_fast.run.interrupt import Interrupt, Stopped
from polymath_fast.run.saving import last_saved, report_of, rescuing, save

if TYPE_CHECKING:
    from polymath_fast.ranks.member import Invitation
    from polymath_fast.rollout.partial import Pending

NONFINITE_LIMIT = 3  # batches in a row without a finite gradient after which a run stops


def train(settings: Config, invitation: Invitation | None = None) -> int:
    """Run the training that `settings` describe; returns the exit code. With an `invitation` it is
    one of several processes of the run, and another one leads."""
    if settings.dry_run:
        from polymath_fast.run.dry_run import dry_run

        return dry_run(settings)
    parts = None
    try:
        with assembly.build(settings, invitation) as parts, Interrupt() as interrupt:
            return _loop(settings, parts, interrupt)
    except KeyboardInterrupt as error:
        where = "before the first step" if parts is None else f"at once; {last_saved(parts)}"
        say(f"stopped {where}")
        return error.exit_code if isinstance(error, Stopped) else 130


def _loop(settings: Config, parts: Parts, interrupt: Interrupt) -> int:
    def asked_to_stop() -> bool:
        return parts.ranks.any(interrupt.requested)

    saved, lost = parts.resumed, 0
    if parts.ranks.any(owes_evaluation(settings, parts)):
        evaluate(settings, parts, parts.steps_done)
    for step in range(parts.steps_done + 1, settings.max_steps + 1):
        with rescuing(settings, parts):
            if asked_to_stop():
                break
            learned = train_step(settings, parts, step)
            lost = lost + 1 if learned.get("update/nonfinite") else 0
            if lost == NONFINITE_LIMIT:
                raise UserError(
                    f"the gradient was not finite in {lost} batches in a row (the last is in "
                    f"{parts.run_dir / 'completions.jsonl'}); no such update reached the weights; "
                    f"go on with a lower --learning-rate, e.g. {settings.learning_rate / 10:g}"
                )
            between = step < settings.max_steps
            if between and due(step, settings.eval_every) and not asked_to_stop():
                evaluate(settings, parts, step)
        if due(step, settings.save_every):
            saved = save(settings, parts)
    complete = parts.steps_done == settings.max_steps and not parts.inputs.held_out
    with rescuing(settings, parts):
        stopped = asked_to_stop() and not complete
    if parts.steps_done > parts.steps_saved:
        saved = save(settings, parts)
    if not stopped:
        evaluate(settings, parts, parts.steps_done)
    if parts.ranks.leads:
        finish(parts, saved, stopped)
    return interrupt.exit_code if stopped else 0


def train_step(settings: Config, parts: Parts, step: int) -> dict[str, float]:
    """Generate, score, learn, sync: one step of the algorithm. Returns its metrics."""
    import torch

    from polymath_fast.kernels import group_advantages
    from polymath_fast.learner.downsampling import train_rewards
    from polymath_fast.learner.rows import training_rows
    from polymath_fast.rollout import collect, loan

    clock = Clock(parts.monitor)
    parts.speculation.start_step()
    parts.tape.start_step()
    batch, scores, attempts, pending = roll_out(settings, parts, step, clock)
    parts.engine.sleep()
    with clock("learn"), parts.engine.lend() as arena:
        rewards = train_rewards(batch, settings)
        advantages = group_advantages(
            torch.tensor(rewards), settings.num_generations, scale=settings.scale_rewards
        ).tolist()
        rows = training_rows(
            batch, rewards, advantages, mask_truncated=settings.mask_truncated_completions
        )
        learned = parts.learner.update(rows, step - 1)
    failure = _sync(settings, parts, clock, bool(learned["update/skipped"]))
    metrics = collect.rollout_metrics(batch, settings) | scores.metrics | learned | clock.metrics()
    metrics |= parts.speculation.metrics(batch, parts.ranks) | loan.metrics(arena)
    metrics["throughput/completion_tokens_per_s"] = batch.num_tokens / metrics["time/step"]
    metrics["memory/peak_gib"] = peak_memory_gib()
    metrics["rollout/resampled"] = attempts - 1
    for note in scores.notes:
        parts.monitor.note(note)
    notes = (saturation.note(settings, learned, batch), loan.note(arena, learned))
    for note in filter(None, notes):
        parts.monitor.note_once(f"step {step}", note)
    parts.monitor.log_step(step, metrics)
    parts.monitor.log_completions(step, collect.completion_rows(batch, scores))
    parts.speculation.end_step(batch)
    parts.tape.end_step()
    parts.pending, parts.steps_done = pending, step
    parts.updates_done = parts.learner.optimizer.updates
    if failure is not None:
        raise failure  # not before: the updates are made, so the step is done, and its row written
    return metrics


def roll_out(
    settings: Config, parts: Parts, step: int, clock: Clock
) -> tuple[RolloutBatch, RewardResult, int, Pending]:
    """Generate and score, again while all scores are alike and the settings say so: completions,
    scores, how often the prompts were asked, and what is to be finished in the next step."""
    from polymath_fast import out_of_memory
    from polymath_fast.ranks.pooling import pooled
    from polymath_fast.rollout import collect
    from polymath_fast.rollout.scoring import Scorer

    samples = collect.samples_of_step(parts.inputs.samples, step, settings)
    batch, scores, attempts = RolloutBatch(groups=[]), RewardResult.empty(), 0
    pending = parts.pending
    while saturation.asks_again(settings, batch, attempts):
        with Scorer(parts.inputs.rewards, parts.inputs.tokenizer) as scorer:
            advice = partial(out_of_memory.while_sampling, settings, parts.tape.rows)
            with clock("generate"), parts.learner.lend(), out_of_memory.named(advice):
                drawn = collect.sample_groups(
                    parts.engine,
                    samples,
                    step,
                    settings,
                    attempts,
                    pending,
                    scorer.add,
                    parts.ranks,
                )
            with clock("score"):
                drawn, found = pooled(parts.ranks, drawn, scorer.score(drawn))
                scores += found
        clock.add("score_overlapped", scorer.overlapped)
        if settings.partial_rollouts:
            pending = pending.after(drawn, settings.asked_generations)
        batch.groups += drawn.groups
        attempts += 1
    return batch, scores, attempts, pending


def _sync(settings: Config, parts: Parts, clock: Clock, skipped: bool) -> Exception | None:
    """Bring the new weights to the engine; what went wrong, if anything did."""
    from polymath_fast.ranks.alike import verify_alike

    policy = parts.learner.policy
    try:
        with clock("sync"):
            if not skipped:
                parts.engine.weights.push(policy.named_weights(), parts.learner.optimizer.updates)
        if settings.verify_sync:
            with clock("verify"):
                parts.engine.weights.verify(policy.named_weights())
                verify_alike(parts.ranks, parts.learner.optimizer.live)
    except (EngineError, UserError) as error:
        return error
    return None


def finish(parts: Parts, saved: Path | None, stopped: bool) -> None:
    """Report, last screen."""
    report = report_of(parts)
    parts.monitor.summary(checkpoint=saved, report=report, interrupted=stopped)


def main(args: list[str] | None = None) -> int:
    """Parse the command line and train; 2 for what the user can mend, 1 when the engine died."""
    try:
        return train(parse(args))
    except (UserError, EngineError) as error:
        print_error(error)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        say("stopped before the run began")
        return 130
