"""--dry-run: everything that can be checked without training, and what a run would do."""

from __future__ import annotations

from polymath_fast import assembly, console, memory, models
from polymath_fast.assembly import Inputs
from polymath_fast.config import Config
from polymath_fast.errors import UserError


def dry_run(config: Config) -> int:
    """Check model, samples, rewards and memory, print the plan, write nothing. Returns 0."""
    out = console.make_console()
    inputs = assembly.read_inputs(config)
    try:
        facts = assembly.plan(config, inputs, None, 0)
        facts["prompt"] = f"{len(inputs.samples[0].prompt_ids)} tokens: {inputs.samples[0].prompt}"
        facts |= _reward_facts(inputs)
        facts |= _memory_facts(config, inputs)
    finally:
        inputs.rewards.close()
    out.print(console.panel("dry run: nothing was written", facts))
    return 0


def _reward_facts(inputs: Inputs) -> dict[str, str]:
    """Rewards of the right and of a wrong answer to every sample; they must differ."""
    facts = {}
    for sample in inputs.samples:
        found = inputs.rewards.check(sample)
        if not facts:
            facts["reward, gold"] = f"{found.gold_completion} -> {found.gold}"
            facts["reward, wrong"] = f"{found.wrong_completion} -> {found.wrong}"
        if found.gold == found.wrong and inputs.judges_answers:
            raise UserError(
                f"the reward gives {found.gold} to the right answer {found.gold_completion} and to "
                f"the wrong one {found.wrong_completion} of {sample.problem!r}; correct the "
                "sample's answer, e.g. --answer 42, or the reward"
            )
    return facts


def _memory_facts(config: Config, inputs: Inputs) -> dict[str, str]:
    shape = models.read_config(inputs.model_dir)
    parameters = memory.count_parameters(inputs.model_dir)
    needs = memory.estimate(config, shape, parameters, inputs.longest_prompt, inputs.engine_name)
    total, free = sum(needs.values()), memory.available(inputs.device)
    parts = ", ".join(f"{name} {size / memory.GIB:.2f}" for name, size in needs.items())
    if total > free:
        raise UserError(
            f"the run needs about {total / memory.GIB:.1f} GiB on {inputs.device} ({parts}), but "
            f"{free / memory.GIB:.1f} GiB are free; {_advice(config, needs, total - free, inputs)}"
        )
    sizes = f"about {total / memory.GIB:.1f} GiB of {free / memory.GIB:.1f} GiB free"
    return {"parameters": f"{parameters:,}", "memory": f"{sizes}: {parts}"}


def _advice(config: Config, needs: dict[str, float], missing: float, inputs: Inputs) -> str:
    """The one knob that would help, with a value."""
    smallest = inputs.longest_prompt + config.max_completion_length
    share = 1 - missing / needs["activations"]
    tokens = int(config.tokens_per_microbatch * share * 0.9)
    if tokens >= smallest:
        return f"--tokens-per-microbatch {tokens} works"
    return "take a smaller model"
