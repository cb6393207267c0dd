"""Out of memory in the learner: which setting to change, and to what."""

from __future__ import annotations

from collections.abc import Sequence

from polymath_fast.config import Config
from polymath_fast.learner.microbatches import split_rows
from polymath_fast.learner.packing import TrainingRow, pack
from polymath_fast.learner.prefix_tree import PrefixTree, Rule, plan
from polymath_fast.memory import TAPED_ROWS


def advice(
    config: Config, rows: Sequence[TrainingRow], tokens: int, rule: Rule | None = None
) -> str:
    """What did not fit, the knob, and a value for it. `tokens`: of a micro-batch; `rule`: by which
    the rows share a prefix tree."""
    tree = None if rule is None else plan(rows, rule)
    taped = [row for row in rows if row.recorded is not None]
    others = [row for row in rows if row.recorded is None]
    many, some = _largest(taped, TAPED_ROWS * tokens, tree), _largest(others, tokens, tree)
    largest, times = (many, TAPED_ROWS) if many > some else (some, 1)
    smallest = max(len(row.prompt_ids) for row in rows) + config.max_completion_length
    knobs = ["--tape-gib 0"] if taped else []
    if largest > smallest * times:
        knobs.append(f"--tokens-per-microbatch {max(smallest, largest // times // 2)}")
    if not config.gradient_checkpointing:
        knobs.append("--gradient-checkpointing")
    if config.num_processes > 1 and not config.shard_optimizer:
        knobs.append("--shard-optimizer")
    if not config.offload_optimizer:
        knobs.append("--offload-optimizer")
    if not knobs:
        knobs.append(f"--max-completion-length {max(1, config.max_completion_length // 2)}")
    more = f", {times} times that from the tape" if times > 1 else ""
    return (
        f"{largest} tokens were learned from at once (--tokens-per-microbatch is "
        f"{tokens}{more}); go on with {' or '.join(knobs)}"
    )


def _largest(rows: Sequence[TrainingRow], tokens: int, tree: PrefixTree | None) -> int:
    """Tokens that enter the model, or are read from the tape, in the largest pass over `rows`;
    prompts once each."""
    sizes = [
        pack([rows[index] for index in part], tree=tree).input_ids.numel()
        for parts in split_rows(rows, tokens, tree)
        for part in parts
    ]
    return max(sizes, default=0)
