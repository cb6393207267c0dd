"""The parts of a run, built from its settings in the order in which mistakes are cheapest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymath_fast import (
    checkpoint,
    environment,
    memory,
    models,
    precision,
    rewards,
    rollout,
    run_folder,
    samples,
    sources,
)
from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.monitor import Monitor
from polymath_fast.rewards import RewardSet
from polymath_fast.rollout.partial import NOTHING, Pending
from polymath_fast.samples import Sample


@dataclass
class Inputs:
    """What can be checked before any weight is loaded."""

    model_dir: Path
    tokenizer: Any
    samples: list[Sample]
    held_out: dict[str, list[Sample]]
    rewards: RewardSet
    engine_name: str
    engine_reason: str
    sync_name: str
    sync_reason: str
    device: str
    dtype: str
    dtype_reason: str

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, of training or evaluation."""
        asked = [*self.samples, *(s for group in self.held_out.values() for s in group)]
        return max(len(sample.prompt_ids) for sample in asked)

    @property
    def judges_answers(self) -> bool:
        """Whether a reward compares answers with the right one (the built-in `math` does)."""
        return any(reward.name == "math" for reward in self.rewards.rewards)


@dataclass
class Parts:
    """Everything the training loop works with."""

    inputs: Inputs
    run_dir: Path
    monitor: Monitor
    learner: Any
    engine: Any
    speculation: Any
    identity: dict[str, Any]
    steps_done: int
    """the last step whose updates are made and whose row is written"""
    updates_done: int
    """updates the optimizer had made then; any other number means that a step broke off midway"""
    steps_saved: int
    """the step of the newest checkpoint, 0 for none"""
    pending: Pending
    """completions that the next step goes on with; changes from step to step"""


def read_inputs(config: Config, notify: Callable[[str], None] = print) -> Inputs:
    """Model folder, tokenizer, samples, rewards and engine choice; raises UserError."""
    environment.prepare()
    device = _device(config.device)
    dtype, dtype_reason = precision.choose_dtype(config.dtype, device)
    if config.master_weights == "remainder" and dtype != "bfloat16":
        raise UserError(
            f"--master-weights remainder completes bfloat16 weights, but here they are {dtype} "
            f"({dtype_reason}), which need no master: leave it out, or pass --dtype bfloat16"
        )
    if config.offload_optimizer:
        from polymath_fast.learner.offload import require_gpu

        require_gpu(device)
    engine_name, engine_reason = rollout.choose_engine(config.engine, config.kv_cache_gib)
    if engine_name == "vllm":
        from polymath_fast.rollout.vllm_process import check_version, require_dtype

        check_version()
        require_dtype(dtype, device)
    model_dir = models.resolve_model(config.model, config.revision, notify)
    if config.release_kv_cache:
        _check_release(engine_name, device)
    sync_name, sync_reason = rollout.choose_weight_sync(
        config.weight_sync,
        engine_name,
        quantization=_quantization(models.read_config(model_dir)),
        verify=config.verify_sync,
    )
    if config.speculate:
        rollout.require_speculation(engine_name, sync_name)
    if config.reuse_kv_cache:
        rollout.require_kv_reuse(engine_name, sync_name)
    tokenizer = samples.load_tokenizer(model_dir)
    context = models.context_length(model_dir)
    trained = samples.from_config(config, tokenizer, context_length=context, notify=notify)
    held_out = {
        name: samples.from_config(
            config, tokenizer, context_length=context, dataset=dataset, notify=notify
        )
        for name, dataset in _evaluation_datasets(config).items()
    }
    _check_microbatch(config, trained)
    return Inputs(
        model_dir=model_dir,
        tokenizer=tokenizer,
        samples=trained,
        held_out=held_out,
        rewards=rewards.build(
            config.reward,
            config.reward_weights,
            config.reward_timeout,
            max_completion_length=config.max_completion_length,
        ),
        engine_name=engine_name,
        engine_reason=engine_reason,
        sync_name=sync_name,
        sync_reason=sync_reason,
        device=device,
        dtype=dtype,
        dtype_reason=dtype_reason,
    )


@contextmanager
def build(config: Config) -> Iterator[Parts]:
    """Lock the run folder, resume if asked, load the learner, start the engine; closes them all."""
    from polymath_fast.learner.policy import Policy
    from polymath_fast.learner.step import Learner
    from polymath_fast.rollout.speculation import Speculation, pass_rows

    with ExitStack() as stack:
        inputs = read_inputs(config)
        stack.callback(inputs.rewards.close)
        run_dir = run_folder.prepare(config.output_dir, resume=config.resume)
        stack.enter_context(run_folder.RunLock(run_dir))
        with run_folder.writing(run_dir):
            checkpoint.sweep(run_dir)
        identity = checkpoint.model_identity(config.model, models.read_config(inputs.model_dir))
        resumed = _find_checkpoint(config, run_dir, identity)
        steps_done = resumed.step if resumed else 0
        with run_folder.writing(run_dir):
            if resumed:
                checkpoint.go_back(config.resume, run_dir, resumed)
            config.write(run_dir / "config.toml")
            monitor = Monitor(
                run_dir, config, config.max_steps, trackers=config.log_to, start_step=steps_done
            )
        stack.enter_context(monitor)
        monitor.plan(plan(config, inputs, run_dir, steps_done))
        _set_threads(config)
        dtype = precision.torch_dtype(inputs.dtype)
        policy = Policy(
            inputs.model_dir,
            device=inputs.device,
            dtype=dtype,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        monitor.phase("start the engine")
        speculation = Speculation(config.speculate, pass_rows(inputs.device, inputs.dtype))
        engine = rollout.build_engine(
            inputs.engine_name,
            model_dir=inputs.model_dir,
            policy=policy,
            stop_token_ids=rollout.stop_token_ids(inputs.model_dir, inputs.tokenizer),
            max_model_len=inputs.longest_prompt + config.max_completion_length,
            max_num_seqs=rollout.max_num_seqs(
                config.asked_generations * config.groups_per_step,
                inputs.engine_name,
                inputs.device,
            ),
            device=inputs.device,
            dtype=inputs.dtype,
            seed=config.seed,
            kv_cache_gib=memory.vllm_kv_cache_gib(
                models.read_config(inputs.model_dir),
                config,
                inputs.longest_prompt,
                device=inputs.device,
                dtype=inputs.dtype,
            ),
            threads=config.threads,
            weight_sync=inputs.sync_name,
            readable_weights=config.verify_sync,
            release_kv_cache=config.release_kv_cache,
            reuse_kv_cache=config.reuse_kv_cache,
            speculation=speculation,
        )
        stack.callback(engine.close)
        reference = None
        if config.beta:
            reference = Policy(inputs.model_dir, device=inputs.device, dtype=dtype)
        learner = Learner(policy, config, reference, engine.weights.attach(policy.model))
        if resumed:
            learner.optimizer.load(resumed.tensors(), resumed.state["updates"])
            engine.weights.push(policy.named_weights(), learner.optimizer.updates)
            speculation.load(resumed.tensors())
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
            learner,
            engine,
            speculation,
            identity,
            steps_done=steps_done,
            updates_done=learner.optimizer.updates,
            steps_saved=steps_done,
            pending=pending,
        )


def plan(config: Config, inputs: Inputs, run_dir: Path | None, steps_done: int) -> dict[str, Any]:
    """What is about to happen, for people."""
    sample = inputs.samples[0]
    rollouts = config.num_generations * config.groups_per_step
    facts = {
        "model": f"{config.model} on {inputs.device}",
        "sample": f"{sample.problem}  ->  {sample.answer}"
        if len(inputs.samples) == 1
        else f"{len(inputs.samples)} samples from {config.dataset}",
        "held out": ", ".join(f"{len(v)} problems ({k})" for k, v in inputs.held_out.items()),
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
    if config.speculate:
        facts["drafts"] = _drafts(config, inputs)
    if run_dir is not None:
        facts["run folder"] = run_dir
    return {name: value for name, value in facts.items() if value != ""}


def _drafts(config: Config, inputs: Inputs) -> str:
    from polymath_fast.rollout.speculation import pass_rows

    rows = pass_rows(inputs.device, inputs.dtype)
    return (
        f"up to {config.speculate} tokens a completion from history (experimental), while at most "
        f"{rows // 2} completions are left"
    )


def _check_release(engine: str, device: str) -> None:
    if engine != "vllm":
        raise UserError(
            "--release-kv-cache is for vLLM; the embedded sampler keeps nothing between rollouts: "
            "leave it out"
        )
    from polymath_fast.rollout.vllm_process import require_release

    require_release(device)


def _quantization(shape: dict[str, Any]) -> str | None:
    quantised = shape.get("quantization_config")
    return quantised and str(quantised.get("quant_method", "unknown method"))


def _evaluation_datasets(config: Config) -> dict[str, str]:
    """Name -> data set of everything that is scored before, during and after training."""
    if config.eval_dataset is None:
        dataset = sources.held_out(config.dataset)
        return {config.dataset.removeprefix("shipped:"): dataset} if dataset else {}
    named = {}
    for entry in config.eval_dataset:
        dataset, _, name = entry.partition("=")
        name = name or Path(dataset.removeprefix("shipped:")).stem
        if name in named:
            raise UserError(
                f"--eval-dataset: two sets are called {name!r}; name one of them, "
                f"e.g. {dataset}={name}_2"
            )
        named[name] = dataset
    return named


def _find_checkpoint(config: Config, run_dir: Path, identity: dict[str, Any]):
    if config.resume is None:
        return None
    found = checkpoint.resume(
        config.resume, run_dir, on_skip=lambda path, why: print(f"skipped {path}: {why}")
    )
    if found is None:
        return None
    found.require_model(identity)
    if found.step >= config.max_steps:
        raise UserError(
            f"--max-steps {config.max_steps}: the checkpoint {found.path} has done {found.step} "
            f"steps already; --max-steps {found.step + 10} goes on"
        )
    return found


def _check_microbatch(config: Config, trained: list[Sample]) -> None:
    longest = max(len(sample.prompt_ids) for sample in trained)
    needed = longest + config.max_completion_length
    tokens = config.tokens_per_microbatch
    if tokens is not None and tokens < needed:
        raise UserError(
            f"--tokens-per-microbatch {tokens} cannot hold one prompt and "
            f"one completion ({longest} + {config.max_completion_length} tokens); {needed} works"
        )


def _device(asked: str) -> str:
    import torch

    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise UserError("--device cuda: torch sees no CUDA device here; --device cpu works")
    return "cuda" if available and asked != "cpu" else "cpu"


def _set_threads(config: Config) -> None:
    import torch

    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
