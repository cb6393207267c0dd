"""What of a run reaches the disk, and under which step: always the one its weights belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from polymath_fast import checkpoint
from polymath_fast.config import Config
from polymath_fast.errors import EngineError, UserError
from polymath_fast.folders import run_folder, step_folders
from polymath_fast.ranks import ALONE
from polymath_fast.run.assembly import Parts


def save(settings: Config, parts: Parts) -> Path | None:
    """Write checkpoints/step_N, N the last step that was done: a Hugging Face folder and all that
    an exact resume needs. Returns its path in the process that leads; all have to call it."""
    try:
        return _save(settings, parts)
    except EngineError as error:
        if not parts.ranks.leads:  # where it waited to take part, it may be called to a rescue
            rescue(settings, parts, error)
        raise


def _save(settings: Config, parts: Parts) -> Path | None:
    path = None
    if parts.ranks.leads:
        parts.monitor.phase("save")
        parts.monitor.sync()
    if settings.shard_optimizer:
        path = _saved_together(settings, parts)
    elif parts.ranks.leads and settings.offload_optimizer:
        from polymath_fast.run import sharing

        state = parts.learner.optimizer.state  # piece by piece: it need not fit into memory
        path = _written(settings, parts, {}, sharing.shared(ALONE, state, parts.steps_done))
    elif parts.ranks.leads:
        path = _written(settings, parts, parts.learner.optimizer.tensors(), None)
    parts.steps_saved = parts.steps_done
    return path


def _saved_together(settings: Config, parts: Parts) -> Path | None:
    """Raises EngineError when a process is gone, whose part is then missing."""
    from polymath_fast.run import sharing

    ranks, optimizer, step = parts.ranks, parts.learner.optimizer, parts.steps_done
    try:
        sharing.require_alike(ranks, step, optimizer.updates)
        if ranks.leads:
            return _written(settings, parts, {}, sharing.shared(ranks, optimizer.state, step))
        sharing.contribute(ranks, optimizer.state, step)
    except EngineError as error:
        raise EngineError(
            f"step {step} could not be saved, which takes all processes of a run with "
            f"--shard-optimizer ({error}); {last_saved(parts)}"
        ) from error
    return None


def _written(
    settings: Config, parts: Parts, tensors: dict[str, Any], shared: checkpoint.Shared | None
) -> Path:
    return checkpoint.save(
        parts.run_dir,
        parts.steps_done,
        model_files=parts.learner.save,
        trainer_tensors=tensors | parts.speculation.tensors(),
        trainer_state={
            "updates": parts.learner.optimizer.updates,
            "model": parts.identity,
            "pending": parts.pending.to_json(),
        },
        keep=settings.keep_checkpoints,
        shared=shared,
    )


@contextmanager
def rescuing(settings: Config, parts: Parts) -> Iterator[None]:
    """A failure inside is followed by a `rescue`."""
    try:
        yield
    except (EngineError, UserError) as error:
        rescue(settings, parts, error)
        raise


def rescue(settings: Config, parts: Parts, failure: Exception) -> None:
    """Save what a failure left, if it is a whole step's and not saved yet; says what it did.

    A step that broke off between two of its updates has moved the weights to where no step ends:
    no checkpoint could name them, and a resume would make the first of these updates twice. Where
    the processes share out the optimizer's state, it takes all of them.
    """
    if not parts.ranks.leads:
        if settings.shard_optimizer:
            with suppress(EngineError, UserError):  # the leader tells
                parts.ranks.muster(failure)
                _save(settings, parts)
        return
    if parts.learner.optimizer.updates != parts.updates_done:
        parts.monitor.note(
            f"step {parts.steps_done + 1} broke off between two of its updates and is not saved; "
            f"{last_saved(parts)}"
        )
    elif parts.steps_done > parts.steps_saved:
        try:
            if settings.shard_optimizer:
                _muster(parts, failure)
            parts.monitor.note(f"saved {_save(settings, parts)}")
        except (EngineError, UserError) as error:  # what called for the rescue is the news
            parts.monitor.note(f"not saved: {error}")


def _muster(parts: Parts, failure: Exception) -> None:
    try:
        parts.ranks.muster(failure)
    except EngineError as error:
        raise EngineError(
            f"{error}, and with it its part of the optimizer's state, which --shard-optimizer "
            f"keeps nowhere else; {last_saved(parts)}"
        ) from error


def last_saved(parts: Parts) -> str:
    """The newest checkpoint of the run and how to go on from it, in one line."""
    saved = step_folders.steps(parts.run_dir / checkpoint.FOLDER)
    if not saved and parts.steps_saved:
        return f"nothing was saved in {parts.run_dir} yet; go on from where this run began"
    what = f"{saved[-1][1]} was saved last" if saved else "nothing was saved yet"
    return f"{what}; go on with:  {run_folder.resume_command(parts.run_dir)}"


def report_of(parts: Parts) -> Path | None:
    """Write the report; a run that is done and saved does not fail for want of it."""
    from polymath_fast.report import write_report

    parts.monitor.phase("write the report")
    try:
        return write_report(parts.run_dir)
    except Exception as error:
        parts.monitor.note(
            f"the report was not written ({str(error) or type(error).__name__}); the run is saved, "
            f"and this writes it:  {run_folder.report_command(parts.run_dir)}"
        )
        return None
