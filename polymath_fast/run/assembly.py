"""The parts of a run, built from its settings in the order in which mistakes are cheapest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polymath_fast import checkpoint, machine, memory, out_of_memory, precision, rollout
from polymath_fast.checkpoint import Checkpoint
from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.folders import run_data, run_folder, step_folders
from polymath_fast.monitor import Monitor
from polymath_fast.monitor.quiet import Quiet
from polymath_fast.ranks import Ranks
from polymath_fast.ranks.launch import launched, require_devices
from polymath_fast.rollout.partial import NOTHING, Pending
from polymath_fast.run import compile_ahead, resuming
from polymath_fast.run.inputs import Inputs, read_inputs
from polymath_fast.run.plan import plan

if TYPE_CHECKING:
    from polymath_fast.learner.policy import Policy
    from polymath_fast.ranks.member import Invitation


class _Begun(NamedTuple):
    """A run folder and where the run in it goes on."""

    ranks: Ranks
    run_dir: Path
    monitor: Monitor | Quiet
    resumed: Checkpoint | None


@dataclass
class Parts:
    """Everything the training loop works with."""

    inputs: Inputs
    run_dir: Path
    monitor: Monitor | Quiet
    ranks: Ranks
    learner: Any
    engine: Any
    speculation: Any
    tape: Any
    identity: dict[str, Any]
    steps_done: int
    """the last step whose updates are made and whose row is written"""
    updates_done: int
    """updates the optimizer had made then; any other number means that a step broke off midway"""
    steps_saved: int
    """the step of the newest checkpoint, 0 for none"""
    resumed: Path | None
    """the checkpoint that the run goes on from"""
    pending: Pending
    """completions that the next step goes on with; changes from step to step"""


@contextmanager
def build(config: Config, invitation: Invitation | None = None) -> Iterator[Parts]:
    """Lock the run folder, resume if asked, start the other processes, load the learner, start the
    engine; closes them all. One that has an `invitation` joins the run of another process."""
    import torch

    from polymath_fast.learner.policy import Policy
    from polymath_fast.learner.step import Learner
    from polymath_fast.rollout.speculation import Speculation, pass_rows
    from polymath_fast.rollout.tape import Tape
    from polymath_fast.rollout.tape_room import keeps_predictions

    with ExitStack() as stack:
        inputs = read_inputs(config, print if invitation is None else _silent)
        stack.callback(inputs.rewards.close)
        identity = checkpoint.model_identity(config.model, inputs.shape)
        if invitation is None:
            ranks, run_dir, monitor, resumed = _begin(config, inputs, identity, stack)
        else:
            ranks, run_dir, monitor, resumed = _join(invitation)
        taped = inputs.tape_rows(config)
        where = (inputs.shape, inputs.device, inputs.dtype)
        stack.enter_context(compile_ahead.begun(*where, taped=taped > 0))
        _set_threads(config)
        dtype = precision.torch_dtype(inputs.dtype)
        of_model = (config, inputs.shape, inputs.dtype)
        with out_of_memory.named(partial(out_of_memory.while_starting, *of_model)):
            policy = Policy(
                inputs.model_dir,
                device=inputs.device,
                dtype=dtype,
                gradient_checkpointing=config.gradient_checkpointing,
            )
            monitor.phase("start the engine")
            speculation = Speculation(config.speculate, pass_rows(inputs.device, inputs.dtype))
            tape = Tape(taped, predictions=keeps_predictions(config))
            engine = _engine(config, inputs, policy, speculation=speculation, tape=tape)
            stack.callback(engine.close)
            reference = None
            if config.beta:
                reference = Policy(inputs.model_dir, device=inputs.device, dtype=dtype)
            learner = Learner(
                policy,
                config,
                reference,
                engine.weights.attach(policy.model),
                lends=inputs.engine_name == "transformers" and inputs.device == "cpu",
                ranks=ranks,
                folder=run_dir,
            )
            # NCCL sets itself up at its first sum, in memory that an update would have filled
            ranks.add(torch.zeros(1, device=inputs.device))
            if resumed:
                with resumed.slices() as slices:
                    learner.optimizer.load(slices, resumed.state["updates"])
                    speculation.load(slices)
                engine.weights.push(policy.named_weights(), learner.optimizer.updates)
            if config.verify_sync:
                engine.weights.verify(policy.named_weights())
        pending = NOTHING
        if resumed and config.partial_rollouts:
            pending = Pending.from_json(
                resumed.state.get("pending", []), config.max_completion_length
            )
        yield Parts(
            inputs,
            run_dir,
            monitor,
            ranks,
            learner,
            engine,
            speculation,
            tape,
            identity,
            steps_done=resumed.step if resumed else 0,
            updates_done=learner.optimizer.updates,
            steps_saved=resumed.step if resumed else 0,
            resumed=resumed.path if resumed else None,
            pending=pending,
        )


def _begin(config: Config, inputs: Inputs, identity: dict[str, Any], stack: ExitStack) -> _Begun:
    """Take the run folder, find what to resume, show the plan, start the other processes."""
    require_devices(config, inputs.device)
    run_dir = run_folder.prepare(config.output_dir, resume=config.resume)
    stack.enter_context(run_folder.RunLock(run_dir))
    with run_folder.writing(run_dir):
        checkpoint.sweep(run_dir)
    resumed = _find_checkpoint(config, run_dir, identity)
    if resumed and not _is_left(config, inputs, run_dir, resumed.step):
        raise UserError(
            f"--max-steps {config.max_steps}: the checkpoint {resumed.path} has done "
            f"{resumed.step} steps already; --max-steps {resumed.step + 10} goes on"
        )
    done = resumed.step if resumed else 0
    with run_folder.writing(run_dir):
        if resumed:
            resuming.go_back(config.resume, run_dir, resumed)
        config.write(run_dir / "config.toml")
        monitor = Monitor(
            run_dir, config, config.max_steps, trackers=config.log_to, start_step=done
        )
    stack.enter_context(monitor)
    monitor.plan(plan(config, inputs, run_dir, done))
    saved = (resumed.path, resumed.step) if resumed else None
    ranks = stack.enter_context(launched(config, inputs.device, run_dir, saved))
    return _Begun(ranks, run_dir, monitor, resumed)


def _join(invitation: Invitation) -> _Begun:
    """Go on where the leader does."""
    saved = invitation.checkpoint
    resumed = checkpoint.load(*saved) if saved else None
    return _Begun(invitation.ranks, invitation.run_dir, Quiet(), resumed)


def _engine(config: Config, inputs: Inputs, policy: Policy, **shared: Any) -> rollout.Engine:
    """The sampler of one process."""
    share = config.of_one_process()
    return rollout.build_engine(
        inputs.engine_name,
        model_dir=inputs.model_dir,
        policy=policy,
        stop_token_ids=rollout.stop_token_ids(inputs.model_dir, inputs.tokenizer),
        max_model_len=inputs.longest_prompt + config.max_completion_length,
        max_num_seqs=rollout.max_num_seqs(
            share.asked_generations * share.groups_per_step, inputs.engine_name, inputs.device
        ),
        device=inputs.device,
        dtype=inputs.dtype,
        seed=config.seed,
        kv_cache_gib=memory.vllm_kv_cache_gib(
            inputs.shape,
            share,
            inputs.longest_prompt,
            device=inputs.device,
            dtype=inputs.dtype,
        ),
        threads=config.threads,
        weight_sync=inputs.sync_name,
        readable_weights=config.verify_sync,
        release_kv_cache=config.release_kv_cache,
        reuse_kv_cache=config.reuse_kv_cache,
        **shared,
    )


def _silent(text: str) -> None:
    """The leader says it."""


def _find_checkpoint(config: Config, run_dir: Path, identity: dict[str, Any]):
    if config.resume is None:
        return None
    torn = []

    def skip(path: Path, why: str) -> None:
        print(f"skipped {path}: {why}")
        torn.append(path)

    found = resuming.resume(config.resume, run_dir, on_skip=skip)
    if found is None:
        return None
    for path in torn:
        if path.parent.resolve() == (run_dir / checkpoint.FOLDER).resolve():
            step_folders.set_aside(path)
    found.require_model(identity)
    return found


def _is_left(config: Config, inputs: Inputs, run_dir: Path, step: int) -> bool:
    """Whether a run that has done `step` steps has any left, or its last evaluation."""
    if step != config.max_steps:
        return step < config.max_steps
    rows = run_data.metrics(run_dir)
    in_place = bool(rows) and rows[-1]["step"] == step
    return in_place and bool(inputs.held_out) and not run_data.evaluated(run_dir, step)


def _set_threads(config: Config) -> None:
    import torch

    torch.set_num_threads(config.threads or machine.cores())
