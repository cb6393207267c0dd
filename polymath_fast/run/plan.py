"""What a run is about to do, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polymath_fast.config import Config
from polymath_fast.ranks.launch import visible_devices
from polymath_fast.run.inputs import Inputs


def plan(config: Config, inputs: Inputs, run_dir: Path | None, steps_done: int) -> dict[str, Any]:
    """What is about to happen, for people."""
    sample = inputs.samples[0]
    rollouts = config.num_generations * config.groups_per_step
    facts = {
        "model": f"{config.model} on {inputs.device}",
        "sample": f"{sample.problem}  ->  {sample.answer}"
        if len(inputs.samples) == 1
        else f"{len(inputs.samples)} samples from {config.dataset}",
        "held out": ", ".join(f"{len(v)} problems ({k})" for k, v in inputs.held_out.items())
        or "no problems, so nothing is evaluated (--eval-dataset names some)",
        "weights": f"{inputs.dtype} ({inputs.dtype_reason})",
        "engine": f"{inputs.engine_name} ({inputs.engine_reason})",
        "weight sync": f"{inputs.sync_name} ({inputs.sync_reason})",
        "a step": f"{config.groups_per_step} group(s) x {config.num_generations} completions = "
        f"{rollouts} of at most {config.max_completion_length} tokens"
        + (f", the first of {config.asked_generations} a group, " if config.oversample else ", ")
        + f"{config.updates_per_batch} update(s)",
        "loss": f"{config.loss_type}, lr {config.learning_rate:g}, T {config.temperature:g}, "
        f"beta {config.beta:g}",
        "steps": f"{config.max_steps}" + (f", {steps_done} done" if steps_done else ""),
    }
    if config.num_processes > 1 or inputs.device == "cuda":
        facts["processes"] = _processes(config, inputs.device)
    taped = inputs.tape_rows(config)
    if taped:
        facts["tape"] = _tape(taped, config.of_one_process())
    if config.speculate:
        facts["drafts"] = _drafts(config, inputs)
    if run_dir is not None:
        facts["run folder"] = run_dir
    return {name: value for name, value in facts.items() if value != ""}


def _processes(config: Config, device: str) -> str:
    count = config.num_processes
    shared = " and of the optimizer's state" if config.shard_optimizer else ""
    if device == "cpu":
        return f"{count}, each with its part of the cores and of every group{shared}"
    seen = len(visible_devices())
    if count > 1:
        return f"{count}, each with a GPU and its part of every group{shared}"
    return "1" if seen == 1 else f"1; {seen} GPUs are visible, --num-processes {seen} uses them"


def _tape(rows: int, config: Config) -> str:
    rollouts = config.num_generations * config.groups_per_step
    fitting = min(rollouts, rows // config.max_completion_length)
    some = "all completions"
    if fitting < rollouts:
        some = f"as many of {rollouts} completions as fit, {fitting} at full length,"
    return f"the sampler's forward passes of {some} are kept; the learner needs none for them"


def _drafts(config: Config, inputs: Inputs) -> str:
    from polymath_fast.rollout.speculation import pass_rows

    rows = pass_rows(inputs.device, inputs.dtype)
    return (
        f"up to {config.speculate} tokens a completion from history (experimental), while at most "
        f"{rows // 2} completions are left"
    )
