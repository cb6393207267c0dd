"""Rollout engines: what samples completions, and how updated weights get there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from polymath_fast.errors import UserError
from polymath_fast.precision import torch_dtype
from polymath_fast.rollout.types import Completion, Drawn, Request, SamplingOptions

if TYPE_CHECKING:
    from polymath_fast.kernels.scratch import Arena
    from polymath_fast.learner.policy import Policy
    from polymath_fast.rollout.speculation import Speculation
    from polymath_fast.rollout.tape import Tape
    from polymath_fast.rollout.weights import WeightSync


class Engine(Protocol):
    """One object that samples. Token ids in, token ids out."""

    name: str
    weights: WeightSync

    def stream(self, requests: Sequence[Request], sampling: SamplingOptions) -> Iterator[Drawn]:
        """Completions as they finish; see `streaming.StreamingEngine`."""

    def generate(
        self, prompt_ids: Sequence[int], n: int, sampling: SamplingOptions
    ) -> list[Completion]:
        """n completions of one prompt."""

    def generate_many(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingOptions
    ) -> list[list[Completion]]:
        """n completions for each prompt, in the order of the prompts."""

    def lend(self) -> AbstractContextManager[Arena | None]:
        """Scratch memory for the learner; see `streaming.StreamingEngine`."""

    def sleep(self) -> None:
        """Give back the memory that sampling does not need until `wake`."""

    def wake(self) -> None:
        """Be ready to sample again."""

    def close(self) -> None:
        """Free everything; the engine is not used again."""


def choose_engine(
    name: str, kv_cache_gib: float | None = None, *, in_tiles: bool = False
) -> tuple[str, str]:
    """The engine that `--engine name` means on this machine, and why.

    `in_tiles`: the embedded sampler would decode the model in tiles, on a CPU, and nothing else was
    asked of vLLM. Raises UserError when it has no KV cache of a given size but one was asked for.
    """
    if name != "auto":
        chosen, reason = name, f"asked for by --engine {name}"
    elif in_tiles and kv_cache_gib is None:
        chosen, reason = "transformers", "embedded; on a CPU it draws one prompt faster than vLLM"
    elif find_spec("vllm") is not None:
        chosen, reason = "vllm", "vLLM is installed"
    else:
        chosen = "transformers"
        reason = "vLLM is not installed; pip install 'polymath-fast[vllm]' adds it"
    if kv_cache_gib is not None and chosen == "transformers":
        raise UserError(
            f"--kv-cache-gib {kv_cache_gib:g} is for vLLM; the embedded sampler takes what its "
            "completions fill: leave it out, or take --engine vllm"
        )
    return chosen, reason


def choose_weight_sync(
    asked: str, engine: str, *, quantization: str | None = None, verify: bool = False
) -> tuple[str, str]:
    """The strategy that `--weight-sync asked` means for this engine, and why.

    Args:
        asked: "auto", "alias", "copy", "ipc" or "reload".
        engine: "vllm" or "transformers".
        quantization: how the engine's weights are quantised, if they are.
        verify: whether every sync is to be proven (`--verify-sync`).

    Raises UserError for what cannot be.
    """
    if engine == "transformers":
        if asked != "auto":
            raise UserError(
                f"--weight-sync {asked} is for vLLM; the embedded sampler runs the learner's own "
                "module: leave it out, or take --engine vllm"
            )
        return "identity", "the sampler runs the learner's own module"
    if quantization is not None:
        if asked in ("alias", "copy", "ipc"):
            raise UserError(
                f"--weight-sync {asked}: the model is quantised ({quantization}), so the learner's "
                "weights are not what the engine keeps; --weight-sync reload works"
            )
        if verify:
            raise UserError(
                f"--verify-sync: the engine's weights are quantised ({quantization}) and have no "
                "bytes to compare; leave it out"
            )
        return "reload", f"the model is quantised ({quantization})"
    if asked != "auto":
        return asked, f"asked for by --weight-sync {asked}"
    return "alias", "one process: learner and engine share the memory of the weights"


def max_num_seqs(completions: int, engine: str, device: str) -> int:
    """How many of `completions` decode together at most.

    vLLM pages its KV cache and puts completions off when it is full, so that on a GPU it may take
    a whole step's at once; the embedded sampler holds memory for each at its full length.
    """
    return min(completions, 1024 if engine == "vllm" and device != "cpu" else 256)


def require_speculation(engine: str, weight_sync: str) -> None:
    """Raise UserError where `--speculate` cannot reach what samples.

    Args:
        engine, weight_sync: as `choose_engine` and `choose_weight_sync` chose them.
    """
    if engine != "vllm":
        return
    if weight_sync == "ipc":
        raise UserError(
            "--speculate drafts in the learner's process, but with --weight-sync ipc vLLM samples "
            "in another; --weight-sync alias works"
        )
    from polymath_fast.rollout.vllm_process import require_drafts

    require_drafts()


def require_kv_reuse(engine: str, weight_sync: str) -> None:
    """Raise UserError where `--reuse-kv-cache` finds no KV cache in the learner's process.

    Args:
        engine, weight_sync: as `choose_engine` and `choose_weight_sync` chose them.
    """
    if engine != "vllm":
        raise UserError(
            "--reuse-kv-cache is for vLLM; the embedded sampler keeps nothing between rollouts: "
            "leave it out, or take --engine vllm"
        )
    if weight_sync == "ipc":
        raise UserError(
            "--reuse-kv-cache: with --weight-sync ipc vLLM and its KV cache are in another "
            "process, whose memory the learner cannot write to; --weight-sync alias works"
        )


def build_engine(
    name: str,
    *,
    model_dir: Path,
    policy: Policy | None,
    stop_token_ids: Sequence[int],
    max_model_len: int,
    max_num_seqs: int,
    device: str,
    dtype: str,
    seed: int = 0,
    kv_cache_gib: float | None = None,
    threads: int | None = None,
    weight_sync: str = "reload",
    readable_weights: bool = False,
    release_kv_cache: bool = False,
    reuse_kv_cache: bool = False,
    speculation: Speculation | None = None,
    tape: Tape | None = None,
) -> Engine:
    """Start the engine called `name` ("vllm" or "transformers"; see `choose_engine`).

    Args:
        policy: the learner's model; the transformers engine samples from it (None loads one).
        stop_token_ids: ids that end a completion.
        max_model_len: tokens of the longest prompt plus those of the longest completion.
        max_num_seqs: completions that decode together at most.
        dtype: of the weights, "bfloat16" or "float32"; see `precision.choose_dtype`.
        weight_sync: of vLLM, see `choose_weight_sync`.
        readable_weights: let vLLM's weights be verified after every sync.
        release_kv_cache: let vLLM's KV cache go while it sleeps.
        reuse_kv_cache: let the learner work in vLLM's KV cache; see `Engine.lend`.
        speculation: what the engine drafts from; None drafts nothing.
        tape: of the transformers engine; None records nothing.
    """
    if name == "transformers":
        from polymath_fast.learner.policy import Policy
        from polymath_fast.rollout.transformers_engine import TransformersEngine

        policy = policy or Policy(model_dir, device=device, dtype=torch_dtype(dtype))
        return TransformersEngine(
            policy,
            stop_token_ids=stop_token_ids,
            max_num_seqs=max_num_seqs,
            speculation=speculation,
            tape=tape,
        )
    settings = {
        "stop_token_ids": stop_token_ids,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "kv_cache_gib": kv_cache_gib,
        "threads": threads,
        "readable_weights": readable_weights,
        "release_kv_cache": release_kv_cache,
    }
    if weight_sync == "ipc":
        if speculation is not None and speculation.most:
            raise ValueError("drafts need the engine in this process; see require_speculation")
        if reuse_kv_cache:
            raise ValueError("a KV cache is lent within a process; see require_kv_reuse")
        from polymath_fast.rollout.remote_engine import RemoteEngine

        return RemoteEngine(model_dir, **settings)
    from polymath_fast.rollout.vllm_engine import VllmEngine

    settings |= {"weight_sync": weight_sync, "reuse_kv_cache": reuse_kv_cache}
    return VllmEngine(model_dir, speculation=speculation, **settings)


def stop_token_ids(model_dir: Path, tokenizer: object) -> list[int]:
    """Every id that ends a completion: the generation config's and the tokenizer's."""
    from transformers import GenerationConfig

    ids: set[int] = set()
    if (model_dir / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(model_dir).eos_token_id
        ids.update(eos if isinstance(eos, list) else [eos])
    ids.add(tokenizer.eos_token_id)
    return sorted(i for i in ids if i is not None)
