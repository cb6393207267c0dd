"""Which settings fit together.

Every refusal is one UserError that names the flag, its value, the rule and a value that works.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polymath_fast.config import loss_checks
from polymath_fast.config.ranges import check_values, flag
from polymath_fast.errors import UserError
from polymath_fast.folders import lookup
from polymath_fast.samples.sources import on_hub, split_name

if TYPE_CHECKING:
    from polymath_fast.config import Config

_LOOKED_FOR = ("model", "dataset", "output_dir", "resume")


def check(config: Config) -> None:
    """Raise UserError for the first setting that cannot work."""
    check_values(config)
    _check_sample(config)
    _check_names(config)
    _check_split(config)
    _check_resume(config)
    _check_rewards(config)
    loss_checks.check_loss(config)
    _check_rollouts(config)
    _check_evaluation(config)
    _check_sizes(config)


def _check_sample(config: Config) -> None:
    if config.answer is not None and config.question is None:
        raise UserError(
            f"--answer is {config.answer!r} but there is no question; "
            f"add one: --question 'What is 6 * 7?' --answer {config.answer!r}"
        )
    if config.question is not None:
        if not config.question.strip():
            raise UserError("--question is empty; write one: --question 'What is 6 * 7?'")
        if config.answer is None or not config.answer.strip():
            raise UserError(
                "--question needs the right answer, which the reward compares with; "
                "add it: --answer 42"
            )
        if (config.max_samples or 1) > 1:
            raise UserError(
                f"--max-samples is {config.max_samples}, but --question is one sample; leave it out"
            )
        if config.dataset is not None:
            raise UserError(
                f"--question and --dataset {config.dataset} are both given; "
                "a run takes its samples from one of them: leave one out"
            )
    for name in ("model", "dataset", "output_dir", "resume", "revision"):
        value = getattr(config, name)
        if value is not None and (not value.strip() or "\0" in value):
            raise UserError(f"{flag(name)} is {value!r}; it must name something: leave it out")


def _check_names(config: Config) -> None:
    asked = [(flag(name), getattr(config, name)) for name in _LOOKED_FOR]
    asked += [("--eval-dataset", entry) for entry in config.eval_dataset or ()]
    asked += [("--reward", name) for name in config.reward]
    for name, value in asked:
        if value is not None:
            lookup.require(name, value.removeprefix("random:"))


def _check_resume(config: Config) -> None:
    if config.resume == "auto" and config.output_dir is None:
        raise UserError(
            "--resume auto goes on with the run of --output-dir, and there is none; add that: "
            "--output-dir runs/first"
        )


def _check_split(config: Config) -> None:
    asked = [config.dataset, *(split_name(entry)[0] for entry in config.eval_dataset or ())]
    if config.dataset_split != "train" and not any(map(on_hub, filter(None, asked))):
        raise UserError(
            f"--dataset-split {config.dataset_split} is for data sets of the hub, and "
            "all data sets here are files; leave it out"
        )


def _check_rewards(config: Config) -> None:
    if not config.reward:
        raise UserError("--reward is empty; name at least one: --reward math")
    weights = config.reward_weights
    if weights is None:
        return
    if len(weights) != len(config.reward):
        raise UserError(
            f"--reward-weights has {len(weights)} values for {len(config.reward)} rewards "
            f"({', '.join(config.reward)}); give one each: "
            f"--reward-weights {' '.join(['1.0'] * len(config.reward))}"
        )
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise UserError(
            f"--reward-weights is {' '.join(map(str, weights))}; weights must be finite and not "
            f"all zero: --reward-weights {' '.join(['1.0'] * len(weights))}"
        )


def _check_rollouts(config: Config) -> None:
    if config.release_kv_cache and config.reuse_kv_cache:
        raise UserError(
            "--reuse-kv-cache works in the KV cache between rollouts, and --release-kv-cache "
            "gives that memory away; leave one of them out"
        )
    if config.num_generations < 2 * config.num_processes:
        fitting = config.num_generations // 2
        raise UserError(
            f"--num-processes is {config.num_processes}, but each takes part in every group, with "
            f"two completions at least, and --num-generations is {config.num_generations}; "
            f"--num-processes {fitting} works, or --num-generations {2 * config.num_processes}"
        )
    if config.shard_optimizer and config.num_processes == 1:
        raise UserError(
            "--shard-optimizer shares the optimizer's state out to the processes of a run, and "
            "--num-processes is 1; leave it out, or pass --num-processes 2 or more"
        )
    trained = config.num_train_generations or config.num_generations
    completions = trained * config.groups_per_step
    if config.updates_per_batch > completions:
        raise UserError(
            f"--updates-per-batch is {config.updates_per_batch}, but a batch trains on "
            f"{completions} completions; {completions} works, 1 is usual"
        )
    if config.tape_gib and config.updates_per_batch > 1:
        raise UserError(
            f"--tape-gib is {config.tape_gib:g}, but from the second of --updates-per-batch "
            f"{config.updates_per_batch} on the weights are not those that sampled; --tape-gib 0 "
            "works"
        )
    if config.tape_gib and config.beta:
        raise UserError(
            f"--tape-gib is {config.tape_gib:g}, but --beta {config.beta:g} compares log-probs "
            "with a reference model's, and one pass must round both; --tape-gib 0 works"
        )
    if config.partial_rollouts and not config.oversample:
        raise UserError(
            "--partial-rollouts goes on with completions that --oversample aborts, and without it "
            "none are; add --oversample 0.25"
        )
    if config.partial_rollouts and config.importance_sampling_mode is None:
        raise UserError(
            "--partial-rollouts trains on tokens that older weights drew, which the loss would "
            "take for the present ones'; add --importance-sampling-mode token_truncate"
        )
    times, period = config.stop_repetition, config.repetition_period
    longest = config.max_completion_length
    if times == 1 or times > longest:
        raise UserError(
            f"--stop-repetition is {times}; it must be 0 (off), or at least 2 and at most "
            f"--max-completion-length ({longest}); {min(32, longest // 4) if longest > 7 else 0} "
            "works"
        )
    if not times and period != type(config).__dataclass_fields__["repetition_period"].default:
        raise UserError(
            f"--repetition-period is {period}, which nothing reads without --stop-repetition; "
            "leave it out, or add --stop-repetition 32"
        )


def _check_evaluation(config: Config) -> None:
    if 0 < config.eval_temperature < 0.01:
        raise UserError(
            f"--eval-temperature is {config.eval_temperature}; it must be 0 (greedy) or at least "
            "0.01; 0 works"
        )
    if config.eval_k > 1 and config.eval_temperature == 0:
        raise UserError(
            f"--eval-k is {config.eval_k} with --eval-temperature 0: greedy completions are all "
            "the same; use --eval-k 1, or --eval-temperature 0.6"
        )


def _check_sizes(config: Config) -> None:
    if config.num_train_generations and config.num_train_generations > config.num_generations:
        raise UserError(
            f"--num-train-generations is {config.num_train_generations}; it must be at most "
            f"--num-generations ({config.num_generations}); {max(2, config.num_generations // 4)} "
            "works"
        )
    tokens = config.tokens_per_microbatch
    if tokens is not None and tokens < config.max_completion_length:
        raise UserError(
            f"--tokens-per-microbatch is {tokens}; one completion must fit, "
            f"so it must be at least --max-completion-length ({config.max_completion_length}); "
            f"{max(16384, 2 * config.max_completion_length)} works"
        )
    if config.warmup_steps >= config.max_steps:
        raise UserError(
            f"--warmup-steps is {config.warmup_steps} of {config.max_steps} steps, so the learning "
            f"rate would never be reached; it must be less than --max-steps; 0 works"
        )
