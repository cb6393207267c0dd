"""--dry-run: everything that can be checked without training, and what a run would do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from polymath_fast import memory
from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.machine import free_memory_bytes
from polymath_fast.monitor import console
from polymath_fast.ranks.launch import require_devices
from polymath_fast.run.inputs import Inputs, read_inputs
from polymath_fast.run.plan import plan


def dry_run(config: Config) -> int:
    """Check model, samples, rewards and memory, print the plan, write nothing. Returns 0."""
    out = console.make_console()
    inputs = read_inputs(config)
    require_devices(config, inputs.device)
    try:
        facts = plan(config, inputs, None, 0)
        facts["prompt"] = f"{len(inputs.samples[0].prompt_ids)} tokens: {inputs.samples[0].prompt}"
        facts |= _reward_facts(inputs)
        facts |= _memory_facts(config, inputs)
    finally:
        inputs.rewards.close()
    out.print(console.panel("dry run: nothing was written", facts))
    return 0


def _reward_facts(inputs: Inputs) -> dict[str, str]:
    """Rewards of the right and of a wrong answer to every sample; they must differ."""
    encode = partial(inputs.tokenizer.encode, add_special_tokens=False)
    facts = {}
    for sample in inputs.samples:
        found = inputs.rewards.check(sample, encode)
        if not facts:
            facts["reward, gold"] = f"{found.gold_completion} -> {found.gold}"
            facts["reward, wrong"] = f"{found.wrong_completion} -> {found.wrong}"
        if inputs.judges_answers and not found.separates:
            raise UserError(
                f"the reward gives {found.gold} to the right answer {found.gold_completion} and to "
                f"the wrong one {found.wrong_completion} of {sample.problem!r}; correct the "
                "sample's answer, e.g. --answer 42, or the reward"
            )
    for name, held_out in inputs.held_out.items():
        try:
            inputs.rewards.check(held_out[0], encode)
        except UserError as error:
            raise UserError(f"evaluation set {name!r} (--eval-dataset): {error}") from None
    return facts


def _memory_facts(config: Config, inputs: Inputs) -> dict[str, str]:
    needs = _needs(config, inputs)
    total, free = sum(needs.values()), _free_gib(inputs.device)
    parts = ", ".join(f"{name} {size:.2f}" for name, size in needs.items())
    copies = config.num_processes if inputs.device == "cpu" else 1  # a GPU has one of them
    if copies > 1:
        parts = f"{copies} times {parts}"
    missing = total - free / copies
    total *= copies
    if missing > 0:
        raise UserError(
            f"the run needs about {total:.1f} GiB on {inputs.device} ({parts}), but {free:.1f} GiB "
            f"are free; {_advice(config, needs, missing, inputs)}"
        )
    return {
        "parameters": f"{memory.parameters(inputs.shape):,}",
        "memory": f"about {total:.1f} GiB of {free:.1f} GiB free: {parts}",
    }


def _needs(config: Config, inputs: Inputs) -> dict[str, float]:
    """GiB for each part of the run."""
    return memory.estimate(
        inputs.shape,
        config,
        engine=inputs.engine_name,
        prompt_tokens=inputs.longest_prompt,
        device=inputs.device,
        dtype=inputs.dtype,
        kv_storages=_kv_storages(config, inputs.shape),
    )


def _kv_storages(config: Config, shape: dict[str, Any]) -> int:
    if not config.reuse_kv_cache:
        return 1
    from polymath_fast.rollout.vllm_process import kv_storages

    return kv_storages(shape["num_hidden_layers"])


def _advice(config: Config, needs: dict[str, float], missing: float, inputs: Inputs) -> str:
    """The one knob that would help, with a value."""

    def fits(**changes: Any) -> bool:
        needed = sum(_needs(replace(config, **changes), inputs).values())
        return needed <= sum(needs.values()) - missing

    if inputs.tape_rows(config) and fits(tape_gib=0):
        return "--tape-gib 0 works"
    smallest = inputs.longest_prompt + config.max_completion_length
    now = memory.microbatch_tokens(config, inputs.device)
    for name, size in needs.items():
        tokens = int(now * (1 - missing / size) * 0.9)
        if name.startswith("activations") and tokens >= smallest:
            return f"--tokens-per-microbatch {tokens} works"
    several = config.num_processes > 1 and not config.shard_optimizer
    if several and fits(shard_optimizer=True):
        return "--shard-optimizer works"
    if not config.offload_optimizer and fits(offload_optimizer=True):
        return "--offload-optimizer works"
    return "take a smaller model"


def _free_gib(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] / memory.GIB
    free = free_memory_bytes()
    if free is None:
        raise UserError("/proc/meminfo does not tell how much memory is free; leave out --dry-run")
    return free / memory.GIB
