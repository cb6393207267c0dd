"""Out of memory in the learner: which setting to change, and to what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from polymath_fast.config import Config
from polymath_fast.errors import OutOfMemory
from polymath_fast.learner.packing import TrainingRow, pack, split_rows
from polymath_fast.learner.prefix_tree import PrefixTree, Rule, plan


@contextmanager
def named(
    config: Config,
    rows: Sequence[TrainingRow],
    tokens: int,
    undo: Callable[[], None],
    rule: Rule | None = None,
) -> Iterator[None]:
    """Memory errors of learning from `rows` become `OutOfMemory` with a way out, after `undo`;
    others pass. `tokens`: of a micro-batch; `rule`: by which the rows share a prefix tree."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        undo()
        raise OutOfMemory(advice(config, rows, tokens, rule)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError of a GPU, torch's RuntimeError of a CPU, or Python's own."""
    import torch

    refused = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return refused or isinstance(error, MemoryError | torch.OutOfMemoryError)


def advice(
    config: Config, rows: Sequence[TrainingRow], tokens: int, rule: Rule | None = None
) -> str:
    """What did not fit, the knob, and a value for it."""
    tree = None if rule is None else plan(rows, rule)
    largest = max(
        _model_rows([rows[index] for index in part], tree)
        for parts in split_rows(rows, tokens, tree)
        for part in parts
    )
    smallest = max(len(row.prompt_ids) for row in rows) + config.max_completion_length
    knobs = ["--tape-gib 0"] if any(row.recorded is not None for row in rows) else []
    if largest > smallest:
        knobs.append(f"--tokens-per-microbatch {max(smallest, largest // 2)}")
    if not config.gradient_checkpointing:
        knobs.append("--gradient-checkpointing")
    if not knobs:
        knobs.append(f"--max-completion-length {max(1, config.max_completion_length // 2)}")
    return (
        f"out of memory: {largest} tokens were learned from at once (--tokens-per-microbatch is "
        f"{tokens}); go on with {' or '.join(knobs)}"
    )


def _model_rows(rows: Sequence[TrainingRow], tree: PrefixTree | None) -> int:
    """Tokens that enter the model for one micro-batch, its prompts once each."""
    return pack(rows, tree=tree).input_ids.numel()
