"""Every setting of a training run, in sections.

The string below a field is its help text, its annotation holds its range, and its default stands
here and nowhere else. Sections only group the flags in --help. Importing this loads neither torch
nor the parser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from polymath_fast.config.ranges import Range
from polymath_fast.kernels.loss_choices import (
    BY_COVARIANCE,
    CORRECTIONS,
    KL_ESTIMATORS,
    LOSS_TYPES,
)

EMBEDDED_MODEL = "embedded:smollm2"
DEFAULT_SAMPLE = "shipped:rectangle"
_LARGEST = 2**31 - 1

Count = Annotated[int, Range(ge=1, le=_LARGEST, works=1)]
Interval = Annotated[int, Range(ge=0, le=_LARGEST, works=10)]
# dro needs a coefficient of its own, which no seed recipe uses and no setting offers. Losses by
# covariance rank all tokens of an update, which enters the model in parts, duplicates once
LossType = Literal[tuple(kind for kind in LOSS_TYPES if kind not in ("dro", *BY_COVARIANCE))]
KLEstimator = Literal[KL_ESTIMATORS]
Correction = Literal[CORRECTIONS]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    model: str = EMBEDDED_MODEL
    """embedded:smollm2 (135M parameters, no download), a local Hugging Face folder, a hub id, or
    random:FAMILY / random:CONFIG.JSON for random weights of an architecture"""
    revision: str | None = None
    """commit, tag or branch of a hub model"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to learn"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """of the weights, in the learner and in the sampler; auto is bfloat16, and float32 on a CPU
    without bfloat16 instructions"""
    threads: Annotated[int, Range(ge=1, le=4096, works=2)] | None = None
    """CPU threads of each process; as many as it has cores when left out"""
    num_processes: Annotated[int, Range(ge=1, le=64, works=2)] = 1
    """processes that share the completions of each step, each with a GPU, or its part of the CPU's
    cores, of its own; their gradients are added up"""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    question: str | None = None
    """the one problem to learn from; needs --answer"""
    answer: str | None = None
    """its right answer"""
    dataset: str | None = None
    """a .jsonl or .parquet file, shipped:NAME, or a hub id; shipped:rectangle when neither this nor
    --question is given"""
    dataset_split: str = "train"
    """split of a hub data set"""
    max_samples: Count | None = None
    """keep only the first ones"""
    template: Literal["chat", "plain", "polymath", "qwen25-math-cot"] = "chat"
    """how a problem becomes a prompt; chat is the model's own template"""
    instruction: str | None = None
    """text after the problem (templates chat and plain); asks for a boxed answer when left out;
    '' for none"""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """what samples completions: transformers is the embedded sampler; auto takes that on a CPU that
    decodes the model in tiles, else vLLM where it is installed"""
    kv_cache_gib: Annotated[float, Range(gt=0, le=65536, works=2)] | None = None
    """memory for vLLM's KV cache in GiB, on a CPU rounded up to whole ones; when left out 1 on a
    CPU, and on a GPU what up to 256 completions of full length fill"""
    release_kv_cache: bool = False
    """give the memory of vLLM's KV cache to the learner between rollouts (GPUs)"""
    reuse_kv_cache: bool = False
    """let the learner's scratch memory lie in vLLM's KV cache between rollouts, as far as it fits;
    changes no result"""
    weight_sync: Literal["auto", "alias", "copy", "ipc", "reload"] = "auto"
    """how updated weights reach vLLM: alias (learner and engine share one memory, nothing moves),
    copy (one launch copies them all), ipc (vLLM in a process of its own, which copies from the
    learner's memory) or reload (vLLM's own loader); auto takes alias where it can"""
    verify_sync: bool = False
    """compare a checksum of every tensor of learner and engine after each sync; a difference ends
    the run"""
    tape_gib: Annotated[float, Range(ge=0, le=65536, works=4)] | None = None
    """memory in GiB for what the embedded sampler computes on its way forward, from which the
    learner goes backward at once: completions that fit there need no forward pass of its own; when
    left out at most three fifths of the memory that the rest of the run leaves on a CPU, but 0 with
    --beta, several updates a batch or --gradient-checkpointing; 0 is off"""
    num_generations: Annotated[int, Range(ge=2, le=1_000_000, works=8)] = 64
    """completions per group; advantages compare the members of a group"""
    num_train_generations: Annotated[int, Range(ge=2, le=1_000_000, works=2)] | None = None
    """train on that many completions of each group only, those whose rewards differ most (PODS); on
    all when left out"""
    groups_per_step: Annotated[int, Range(ge=1, le=1_000_000, works=1)] = 8
    """groups per step; a single sample is asked in every group"""
    oversample: Annotated[float, Range(ge=0, le=16, works=0.25)] = 0.0
    """ask for that share of completions more than a group needs, and abort those that are left when
    it has enough: nobody waits for the longest ones, but long ones are missing"""
    partial_rollouts: bool = False
    """keep what --oversample aborts and go on with it in later steps, under newer weights; needs
    --importance-sampling-mode"""
    max_completion_length: Annotated[int, Range(ge=1, le=10_000_000, works=1024)] = 1024
    """tokens per completion at most"""
    stop_repetition: Annotated[int, Range(ge=0, le=1_000_000, works=32)] = 0
    """end a completion whose last tokens are one pattern that many times in a row, in one step; 0
    never does"""
    repetition_period: Annotated[int, Range(ge=1, le=4096, works=16)] = 16
    """with --stop-repetition: tokens of such a pattern at most"""
    temperature: Annotated[float, Range(ge=0.01, le=10, works=1.0)] = 1.0
    """sampling temperature, also applied to the log-probs that are trained"""
    speculate: Annotated[int, Range(ge=0, le=64, works=4)] = 0
    """experimental: draft up to that many tokens of a completion from what followed in the last
    steps' completions of its prompt, when few completions are left, and verify them in one pass;
    changes the speed, not the distribution; 0 is off"""


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    reward: tuple[str, ...] = ("math",)
    """rewards: names such as math, or your own as FILE.py:FUNCTION"""
    reward_weights: tuple[float, ...] | None = None
    """one weight per reward; all 1 when left out"""
    reward_timeout: Annotated[float, Range(gt=0, le=3600, works=5)] = 5.0
    """seconds to judge one distinct answer before its process is killed; for a function of your own
    seconds per completion"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """divide advantages by the standard deviation within the group, the batch, or not at all"""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    loss_type: LossType = "dapo"
    """policy loss and its normalisation; dapo is the clipped loss averaged over tokens. A run
    learns in parts, so it has no clip_cov and kl_cov, which rank all tokens of an update"""
    epsilon: Annotated[float, Range(gt=0, lt=1, works=0.2)] = 0.2
    """ratio is clipped below at 1 - epsilon; geo_mean clips its logarithm at -epsilon; with dppo it
    is the divergence that is allowed where the advantage is negative. With one update per batch
    the ratio is 1, and nothing is clipped"""
    epsilon_high: Annotated[float, Range(gt=0, le=1e6, works=0.28)] | None = None
    """ratio is clipped above at 1 + epsilon-high, as epsilon below; equals epsilon when left out;
    with cispo the largest ratio itself"""
    delta: Annotated[float, Range(gt=1, le=1e6, works=4)] | None = None
    """upper bound of the ratio of completions with negative advantage; one below the upper clip
    bounds those with positive advantage instead, and the upper clip those with negative"""
    beta: Annotated[float, Range(ge=0, le=1000, works=0)] = 0.0
    """weight of the KL divergence from the starting model; 0 needs no reference model"""
    kl_estimator: KLEstimator = "k3"
    """estimator of that divergence"""
    entropy_coef: Annotated[float, Range(ge=-10, le=10, works=0)] = 0.0
    """weight of the entropy bonus"""
    importance_sampling_mode: Correction | None = None
    """weigh the loss by the probability under the learner divided by that under the sampler, of
    each token or of the whole completion, truncated to (TIS) or masked outside of (MIS) the two
    bounds below; costs no extra pass"""
    importance_sampling_clip_max: Annotated[float, Range(gt=0, works=3)] = 3.0
    """upper bound of that weight; inf for none"""
    importance_sampling_clip_min: Annotated[float, Range(gt=0, le=1e6, works=0.5)] | None = None
    """lower bound of that weight"""
    mask_truncated_completions: bool = False
    """leave completions that hit the length limit, or --stop-repetition, out of the loss"""
    on_saturation: Literal["skip", "resample", "entropy"] = "skip"
    """when the rewards of every group are equal: skip the update, draw more completions, or train
    an entropy bonus; --beta and --entropy-coef are trained all the same"""
    max_resamples: Annotated[int, Range(ge=1, le=1000, works=4)] = 4
    """with resample: how often the groups of a step are asked again at most"""
    saturation_entropy_coef: Annotated[float, Range(ge=-10, le=10, works=0.001)] = 0.001
    """with entropy: weight of that bonus"""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    learning_rate: Annotated[float, Range(ge=0, le=1, works=1e-6)] = 1e-6
    """peak learning rate of AdamW"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """learning rate after warm-up"""
    warmup_steps: Annotated[int, Range(ge=0, le=_LARGEST, works=0)] = 0
    """steps of linear warm-up"""
    weight_decay: Annotated[float, Range(ge=0, le=10, works=0)] = 0.0
    """decoupled weight decay"""
    adam_beta1: Annotated[float, Range(ge=0, lt=1, works=0.9)] = 0.9
    """decay of the first moment"""
    adam_beta2: Annotated[float, Range(ge=0, lt=1, works=0.999)] = 0.999
    """decay of the second moment"""
    adam_eps: Annotated[float, Range(ge=2**-126, le=1, works=1e-8)] = 1e-8
    """term added to the denominator"""
    max_grad_norm: Annotated[float, Range(gt=0, works=1)] = 1.0
    """gradients are scaled down to this norm; inf never does"""
    master_weights: Literal["float32", "remainder"] = "float32"
    """what completes bfloat16 weights to float32 ones: a float32 copy, or the 16 bits that are
    missing, which saves two bytes a parameter and changes no result"""
    offload_optimizer: bool = False
    """keep moments and master weights elsewhere and stream them through at each update: of a GPU in
    the host's memory, of a CPU in a file in the run folder that ends with the run; 12 bytes a
    parameter (10 with a remainder) less"""
    shard_optimizer: bool = False
    """with --num-processes N each process keeps moments and master weights of an N-th of the
    weights only, and updates those (ZeRO stage 1). Off, the first process saves the run when
    another one dies; on, a part of the state dies with it, and the last checkpoint is what is
    left"""
    updates_per_batch: Annotated[int, Range(ge=1, le=10_000, works=1)] = 1
    """optimizer updates per batch of rollouts; with 1 the ratio is 1 and no old log-probs are
    needed"""
    tokens_per_microbatch: Annotated[int, Range(ge=1, le=_LARGEST, works=16384)] | None = None
    """tokens that are learned from at once, half of them of completions at least, however long the
    prompt is: the one memory knob; when left out 16384 on a GPU and 2048 on a CPU, whose products
    are at their full rate from there on"""
    active_vocabulary: Literal["off", "auto"] = "off"
    """auto leaves vocabulary columns that hardly matter out of the LM head's gradient, where that
    saves time and its relative error stays below that of rounding to bfloat16"""
    prefix_tree: Literal["off", "auto", "on"] = "auto"
    """completions of a prompt that begin with the same tokens share the rows of the model for them,
    exactly; auto where that saves more than attention pays for it, on for each common run of 8
    tokens or more (of any length in a CPU's tiles)"""
    gradient_checkpointing: bool = False
    """keep only the inputs of the model's layers for the backward pass and compute the rest again:
    about a third more work, a fraction of the memory"""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    max_steps: Count = 200
    """batches of rollouts to learn from"""
    seed: Annotated[int, Range(ge=0, le=2**32 - 1, works=0)] = 0
    """seed of everything random"""
    output_dir: str | None = None
    """run folder; runs/DATE-TIME when left out"""
    resume: str | None = None
    """continue a run: auto (newest good checkpoint of --output-dir), a run folder or a
    checkpoint"""
    save_every: Interval = 50
    """steps between checkpoints; 0 saves only at the end"""
    keep_checkpoints: Count = 2
    """older checkpoints are deleted"""
    log_to: tuple[Literal["wandb", "trackio", "tensorboard"], ...] = ()
    """trackers next to metrics.jsonl, which is always written"""
    log_completions_every: Interval = 10
    """steps between tables of completions on the console; 0 shows none"""
    dry_run: bool = False
    """check model, sample, rewards and memory, print the plan and stop"""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    eval_dataset: tuple[str, ...] | None = None
    """files of problems scored before, during and after training; the held-out problems of a
    shipped sample when left out; without a value: none"""
    eval_every: Interval = 20
    """steps between evaluations; 0 evaluates only before and after"""
    eval_k: Annotated[int, Range(ge=1, le=10_000, works=1)] = 1
    """completions per evaluation problem"""
    eval_temperature: Annotated[float, Range(ge=0, le=10, works=0)] = 0.0
    """temperature of evaluations; 0 is greedy"""


SECTIONS = {
    "model": ModelSettings,
    "sample": SampleSettings,
    "rollout": RolloutSettings,
    "reward": RewardSettings,
    "loss": LossSettings,
    "optimizer": OptimizerSettings,
    "run": RunSettings,
    "evaluation": EvaluationSettings,
}
