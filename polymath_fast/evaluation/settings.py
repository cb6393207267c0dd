"""The flags of python -m polymath_fast.evaluate, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from polymath_fast.config.settings import EMBEDDED_MODEL
from polymath_fast.errors import UserError
from polymath_fast.folders import lookup
from polymath_fast.samples.sources import on_hub, split_name

_REGRADING = {"result_path", "output_dir", "open_ended_sources", "mcp_sources", "reward_timeout"}


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Every flag of the command."""

    model: str = EMBEDDED_MODEL
    """embedded:smollm2, a local Hugging Face folder (a checkpoint of a run is one), a hub id, or
    random:FAMILY"""
    revision: str | None = None
    """commit, tag or branch of a hub model"""
    dataset: tuple[str, ...] = ()
    """files of problems, each FILE or FILE=NAME: .jsonl, .parquet, shipped:NAME or a hub id; the
    held-out problems of the shipped sample when left out"""
    dataset_split: str = "test"
    """split of hub data sets"""
    max_problems: int | None = None
    """keep only the first ones of each file"""
    k: int = 1
    """completions per problem"""
    temperature: float = 0.0
    """sampling temperature; 0 is greedy"""
    max_completion_length: int = 1024
    """tokens per completion"""
    template: Literal["chat", "plain", "polymath", "qwen25-math-cot"] = "chat"
    """how a problem becomes a prompt; chat is the model's own template"""
    instruction: str | None = None
    """text after the problem (templates chat and plain); asks for a boxed answer when left out"""
    open_ended_sources: tuple[str, ...] = ()
    """names of files (or data_source values) graded as open-ended, whatever their rows look like"""
    mcp_sources: tuple[str, ...] = ()
    """those graded as multiple choice: the option letter in the box"""
    result_path: str | None = None
    """grade the completions of this result.json again instead of asking a model"""
    reward_timeout: float = 5.0
    """seconds that verifying one distinct answer may take"""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """what samples the completions"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the model runs"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """of the weights; auto is bfloat16, and float32 on a CPU without bfloat16 instructions"""
    kv_cache_gib: float | None = None
    """memory for vLLM's KV cache; vLLM's own choice when left out"""
    threads: int | None = None
    """CPU threads; as many as there are cores when left out"""
    seed: int = 0
    """seed of the sampling"""
    output_dir: str | None = None
    """new folder for result.json and completions.jsonl; runs/evaluate-DATE-TIME when left out"""

    def check(self) -> None:
        """Raises UserError for values that cannot work. Not done on construction: the parser would
        turn the message into a box of its own."""
        lookup.require("--model", self.model.removeprefix("random:"))
        lookup.require("--result-path", self.result_path or ".")
        for entry in self.dataset:
            lookup.require("--dataset", entry)
        _require(self.k >= 1, "--k", self.k, "at least 1", "8")
        _require(
            self.temperature == 0 or 0.01 <= self.temperature <= 10,
            *("--temperature", self.temperature, "0 (greedy) or between 0.01 and 10", "0.6"),
        )
        longest = self.max_completion_length
        _require(longest >= 1, "--max-completion-length", longest, "at least 1 token", "1024")
        _require(
            0 < self.reward_timeout <= 3600,
            *("--reward-timeout", self.reward_timeout, "between 0 and 3600 seconds", "5"),
        )
        _require(0 <= self.seed < 2**31, "--seed", self.seed, "between 0 and 2147483647", "0")
        for name, most in (("max_problems", math.inf), ("threads", 4096), ("kv_cache_gib", 65536)):
            value = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            rule = "above 0" + (f" and at most {most}" if most < math.inf else "")
            _require(value is None or 0 < value <= most, flag, value, rule, "4")
        entries = [split_name(entry)[0] for entry in self.dataset]
        if self.dataset_split != type(self).dataset_split and not any(map(on_hub, entries)):
            raise UserError(
                f"--dataset-split {self.dataset_split} is for data sets of the hub, and all data "
                "sets here are files; leave it out"
            )
        if self.k > 1 and self.temperature == 0:
            raise UserError(
                f"--k is {self.k} with --temperature 0: greedy completions are all the same; use "
                "--k 1, or --temperature 0.6"
            )
        self._check_regrading()

    def _check_regrading(self) -> None:
        """What is graded again was sampled already: no flag about sampling has a meaning."""
        if self.result_path is None:
            return
        for field in fields(self):
            asked = getattr(self, field.name) != field.default
            if asked and field.name not in _REGRADING:
                flag = f"--{field.name.replace('_', '-')}"
                raise UserError(
                    f"--result-path grades completions of an earlier evaluation again, {flag} is "
                    "for asking a model: leave one of the two out"
                )


def _require(holds: bool, flag: str, value: object, rule: str, works: str) -> None:
    if not holds:
        raise UserError(f"{flag} is {value}; it must be {rule}; {works} works")


def parse(args: Sequence[str] | None = None) -> EvalSettings:
    """Settings from the command line, not yet checked. An unknown flag ends the process with code
    2 and names the nearest one."""
    import tyro

    return tyro.cli(
        EvalSettings,
        args=args,
        prog="python -m polymath_fast.evaluate",
        description="Score a model on files of problems: mean@k and pass@k with 95 % intervals.",
    )
