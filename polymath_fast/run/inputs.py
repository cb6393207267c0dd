"""What a run is made from, checked before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymath_fast import environment, machine, models, precision, rewards, rollout, samples
from polymath_fast.config import Config
from polymath_fast.config.ranges import changed, flag
from polymath_fast.errors import UserError
from polymath_fast.kernels import dispatch
from polymath_fast.learner.families import check_shape
from polymath_fast.rewards import RewardSet
from polymath_fast.rewards.equality import settle
from polymath_fast.rewards.extraction import extract_answer
from polymath_fast.run import resuming
from polymath_fast.samples import Sample, sources
from polymath_fast.samples.prompts import DEFAULT_INSTRUCTION


@dataclass
class Inputs:
    """What can be checked before any weight is loaded."""

    model_dir: Path
    shape: dict[str, Any]
    """the keys of the model's config.json"""
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

    def tape_rows(self, config: Config) -> int:
        """Tokens that the sampler keeps for the learner."""
        from polymath_fast.rollout.tape_room import tape_rows

        return tape_rows(
            self.shape,
            config,
            engine=self.engine_name,
            prompt_tokens=self.longest_prompt,
            device=self.device,
            dtype=self.dtype,
        )

    @property
    def judges_answers(self) -> bool:
        """Whether a reward compares answers with the right one (the built-in `math` does)."""
        return any(reward.name == "math" for reward in self.rewards.rewards)


def read_inputs(config: Config, notify: Callable[[str], None] = print) -> Inputs:
    """Model folder, tokenizer, samples, rewards and engine choice; raises UserError."""
    resuming.require_something(config.resume)
    environment.prepare()
    try:
        dispatch.default_implementation()
    except ValueError as error:
        raise UserError(str(error)) from None
    device = machine.device(config.device)
    dtype, dtype_reason = precision.choose_dtype(config.dtype, device)
    if config.master_weights == "remainder" and dtype != "bfloat16":
        raise UserError(
            f"--master-weights remainder completes bfloat16 weights, but here they are {dtype} "
            f"({dtype_reason}), which need no master: leave it out, or pass --dtype bfloat16"
        )
    if config.active_vocabulary == "auto" and device == "cuda" and dtype == "float32":
        raise UserError(
            "--active-vocabulary auto: in float32 a GPU's LM head keeps every column; leave it "
            "out, or pass --dtype bfloat16"
        )
    model_dir = models.resolve_model(config.model, config.revision, notify)
    shape = models.read_config(model_dir)
    check_shape(model_dir, shape)
    engine_name, engine_reason = rollout.choose_engine(
        config.engine,
        config.kv_cache_gib,
        in_tiles=_decodes_in_tiles(config, shape, device, dtype),
    )
    if engine_name == "vllm":
        from polymath_fast.rollout.vllm_process import require_usable

        require_usable(dtype, device)
    if config.release_kv_cache:
        _check_release(engine_name, device)
    sync_name, sync_reason = rollout.choose_weight_sync(
        config.weight_sync,
        engine_name,
        quantization=_quantization(shape),
        verify=config.verify_sync,
    )
    if config.speculate:
        rollout.require_speculation(engine_name, sync_name)
    if config.reuse_kv_cache:
        rollout.require_kv_reuse(engine_name, sync_name)
    if config.tape_gib:
        from polymath_fast.rollout.tape_room import require_tape

        require_tape(config.tape_gib, engine_name, device, shape, precision.torch_dtype(dtype))
    tokenizer = samples.load_tokenizer(model_dir)
    context = models.context_length(model_dir)
    trained = samples.from_config(config, tokenizer, context_length=context, notify=notify)
    held_out = {
        name: samples.from_config(
            config,
            tokenizer,
            context_length=context,
            dataset=dataset,
            asked=f"--eval-dataset {entry}",
            notify=notify,
        )
        for name, (dataset, entry) in _evaluation_datasets(config).items()
    }
    _note_idle_bounds(config, notify)
    if "math" in config.reward:
        _note_unasked_boxes(trained, notify)
    inputs = Inputs(
        model_dir=model_dir,
        shape=shape,
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
    if config.tape_gib and not inputs.tape_rows(config):
        raise UserError(
            f"--tape-gib is {config.tape_gib:g}, which is less than one token takes; 1 works, and "
            "0 is off"
        )
    return inputs


def _decodes_in_tiles(config: Config, shape: dict[str, Any], device: str, dtype: str) -> bool:
    """Whether the embedded sampler would, and no setting is for vLLM alone."""
    from polymath_fast.rollout.tape_room import in_tiles

    asked = config.weight_sync != "auto" or config.reuse_kv_cache or config.release_kv_cache
    return device == "cpu" and not asked and in_tiles(shape, precision.torch_dtype(dtype))


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


def _evaluation_datasets(config: Config) -> dict[str, tuple[str, str]]:
    """Name -> data set, and the value that asks for it, of everything that is scored before, during
    and after training."""
    if config.eval_dataset is None:
        dataset = sources.held_out(config.dataset)
        return {config.dataset.removeprefix("shipped:"): (dataset, dataset)} if dataset else {}
    named = {}
    for entry in config.eval_dataset:
        dataset, name = sources.split_name(entry)
        name = name or Path(dataset.removeprefix("shipped:")).stem
        sources.require_name("--eval-dataset", dataset, name)
        if name in named:
            raise UserError(
                f"--eval-dataset {entry}: there is a set called {name!r} already; name one of "
                f"them, e.g. {dataset}={name}_2"
            )
        named[name] = (dataset, entry)
    return named


def _note_idle_bounds(config: Config, notify: Callable[[str], None]) -> None:
    """The first update of a batch is on policy, and bounds of a ratio of 1 do nothing."""
    given = changed(config)
    idle = [flag(name) for name in ("epsilon", "epsilon_high", "delta") if name in given]
    if idle and config.updates_per_batch == 1 and config.loss_type != "cispo":
        notify(
            f"{' and '.join(idle)} will change nothing: with --updates-per-batch 1 the ratio is 1 "
            "everywhere; --updates-per-batch 2 makes use of bounds"
        )


def _note_unasked_boxes(trained: list[Sample], notify: Callable[[str], None]) -> None:
    """Without a box the last number counts: an answer that is none would hardly ever be found."""
    for sample in trained:
        found = extract_answer(f"So it is {sample.answer}.")
        plain = found is not None and settle(found, sample.answer)
        if not plain and not any(words in sample.prompt for words in ("boxed", "answer is")):
            notify(
                f"the prompt asks for no \\boxed{{}}, and outside of one the reward 'math' finds "
                f'numbers, or what follows "answer is": {sample.answer!r} may never be found; '
                f'ask for one, for example with --instruction "{DEFAULT_INSTRUCTION}"'
            )
            return
