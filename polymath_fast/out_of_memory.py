"""A device or a system that has no memory left: which setting to change, and to what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from polymath_fast import memory
from polymath_fast.config import Config
from polymath_fast.errors import EngineError, OutOfMemory


@contextmanager
def named(advice: Callable[[], str], undo: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Memory errors inside become `OutOfMemory` that says `advice()`, after `undo`; others pass, an
    engine's among them, which knows better what to change."""
    try:
        yield
    except EngineError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        undo()
        raise OutOfMemory(f"out of memory: {advice()}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError of a GPU, torch's RuntimeError of a CPU, or Python's own."""
    import torch

    refused = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return refused or isinstance(error, MemoryError | torch.OutOfMemoryError)


def while_sampling(config: Config, taped: int) -> str:
    """What did not fit, and what makes a step's completions smaller; `taped`: rows of the tape."""
    share, fewer = config.of_one_process(), config.num_generations // 2
    asked = share.asked_generations * config.groups_per_step
    knobs = ["--tape-gib 0"] if taped else []
    if config.max_completion_length > 1:
        knobs.append(f"--max-completion-length {config.max_completion_length // 2}")
    trained = config.num_train_generations or 0
    if asked <= memory.FULL_LENGTH_SEQUENCES and fewer >= max(2 * config.num_processes, trained):
        knobs.append(f"--num-generations {fewer}")
    return (
        f"{asked} completions of at most {config.max_completion_length} tokens were sampled"
        f"{_go_on(config, knobs)}"
    )


def while_starting(config: Config, shape: dict[str, Any], dtype: str) -> str:
    """What did not fit, and what makes the state of a run smaller; `shape` and `dtype`: of the
    model."""
    whole = config.master_weights == "float32" and dtype == "bfloat16"
    knobs = ["--master-weights remainder"] if whole else []
    weights = memory.parameters(shape)
    return (
        f"the run was about to begin with a model of {weights:,} weights{_go_on(config, knobs)}; "
        "--dry-run tells what needs how much"
    )


def _go_on(config: Config, knobs: list[str]) -> str:
    if not config.offload_optimizer:
        knobs = [*knobs, "--offload-optimizer"]
    return f"; go on with {' or '.join(knobs)}" if knobs else "; a smaller --model takes less"
