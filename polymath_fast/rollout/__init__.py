"""Rollout engines: what samples completions, and how updated weights get there."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from polymath_fast.rollout.types import Completion, SamplingOptions

if TYPE_CHECKING:
    from polymath_fast.learner.policy import Policy
    from polymath_fast.rollout.weights import WeightSync


class Engine(Protocol):
    """One object that samples. Token ids in, token ids out."""

    name: str
    weights: WeightSync

    def generate(
        self, prompt_ids: Sequence[int], n: int, sampling: SamplingOptions
    ) -> list[Completion]:
        """n completions of one prompt."""

    def generate_many(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingOptions
    ) -> list[list[Completion]]:
        """n completions for each prompt, in the order of the prompts."""

    def sleep(self) -> None:
        """Give back the memory that sampling does not need until `wake`."""

    def wake(self) -> None:
        """Be ready to sample again."""

    def close(self) -> None:
        """Free everything; the engine is not used again."""


def choose_engine(name: str) -> tuple[str, str]:
    """The engine that `--engine name` means on this machine, and why."""
    if name != "auto":
        return name, f"asked for by --engine {name}"
    if find_spec("vllm") is not None:
        return "vllm", "vLLM is installed"
    return "transformers", "vLLM is not installed; pip install 'polymath-fast[vllm]' adds it"


def build_engine(
    name: str,
    *,
    model_dir: Path,
    policy: Policy | None,
    stop_token_ids: Sequence[int],
    max_model_len: int,
    max_num_seqs: int,
    device: str,
    seed: int = 0,
    kv_cache_gib: float | None = None,
    threads: int | None = None,
) -> Engine:
    """Start the engine called `name` ("vllm" or "transformers"; see `choose_engine`).

    Args:
        policy: the learner's model; the transformers engine samples from it (None loads one).
        stop_token_ids: ids that end a completion.
        max_model_len: tokens of the longest prompt plus those of the longest completion.
        max_num_seqs: completions that decode together at most.
    """
    if name == "transformers":
        from polymath_fast.learner.policy import Policy
        from polymath_fast.rollout.transformers_engine import TransformersEngine

        policy = policy or Policy(model_dir, device=device)
        return TransformersEngine(policy, stop_token_ids=stop_token_ids, max_num_seqs=max_num_seqs)
    from polymath_fast.rollout.vllm_engine import VllmEngine

    return VllmEngine(
        model_dir,
        stop_token_ids=stop_token_ids,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        device=device,
        seed=seed,
        kv_cache_gib=kv_cache_gib,
        threads=threads,
    )


def stop_token_ids(model_dir: Path, tokenizer: object) -> list[int]:
    """Every id that ends a completion: the generation config's and the tokenizer's."""
    from transformers import GenerationConfig

    ids: set[int] = set()
    if (model_dir / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(model_dir).eos_token_id
        ids.update(eos if isinstance(eos, list) else [eos])
    ids.add(tokenizer.eos_token_id)
    return sorted(i for i in ids if i is not None)
