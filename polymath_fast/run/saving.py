"""What of a run reaches the disk, and under which step: always the one its weights belong to."""

from __future__ import annotations

from pathlib import Path

from polymath_fast import checkpoint
from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.folders import run_folder, step_folders
from polymath_fast.run.assembly import Parts


def save(settings: Config, parts: Parts) -> Path:
    """Write checkpoints/step_N, N the last step that was done: a Hugging Face folder and all that
    an exact resume needs."""
    parts.monitor.phase("save")
    parts.monitor.sync()
    path = checkpoint.save(
        parts.run_dir,
        parts.steps_done,
        model_files=parts.learner.save,
        trainer_tensors=parts.learner.optimizer.tensors() | parts.speculation.tensors(),
        trainer_state={
            "updates": parts.learner.optimizer.updates,
            "model": parts.identity,
            "pending": parts.pending.to_json(),
        },
        keep=settings.keep_checkpoints,
    )
    parts.steps_saved = parts.steps_done
    return path


def rescue(settings: Config, parts: Parts) -> None:
    """Save what a failure left, if it is a whole step's and not saved yet; says what it did.

    A step that broke off between two of its updates has moved the weights to where no step ends:
    no checkpoint could name them, and a resume would make the first of these updates twice.
    """
    if not parts.ranks.leads:
        return
    if parts.learner.optimizer.updates != parts.updates_done:
        parts.monitor.note(
            f"step {parts.steps_done + 1} broke off between two of its updates and is not saved; "
            f"{last_saved(parts)}"
        )
    elif parts.steps_done > parts.steps_saved:
        try:
            parts.monitor.note(f"saved {save(settings, parts)}")
        except UserError as error:  # what called for the rescue is the news, not this
            parts.monitor.note(f"not saved: {error}")


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
