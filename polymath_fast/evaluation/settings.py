"""The flags of python -m polymath_fast.evaluate, checked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_type_hints

from polymath_fast.config.flag_values import joined, refuse_unreadable
from polymath_fast.config.ranges import Range, check_values, flag
from polymath_fast.config.settings import EMBEDDED_MODEL, Count
from polymath_fast.config.toml_flags import refuse_unknown
from polymath_fast.errors import UserError
from polymath_fast.folders import lookup
from polymath_fast.samples.sources import on_hub, require_name, split_name

OF_GRADING = (
    *("result_path", "open_ended_sources", "mcp_sources", "reward_timeout", "output_dir"),
)
"""settings that mean something where completions are only graded"""


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
    max_problems: Count | None = None
    """keep only the first ones of each file"""
    k: Annotated[int, Range(ge=1, le=1_000_000, works=8)] = 1
    """completions per problem"""
    temperature: Annotated[float, Range(ge=0, le=10, works=0.6)] = 0.0
    """sampling temperature; 0 is greedy"""
    max_completion_length: Annotated[int, Range(ge=1, le=10_000_000, works=1024)] = 1024
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
    reward_timeout: Annotated[float, Range(gt=0, le=3600, works=5)] = 5.0
    """seconds that verifying one distinct answer may take"""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """what samples the completions"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the model runs"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """of the weights; auto is bfloat16, and float32 on a CPU without bfloat16 instructions"""
    kv_cache_gib: Annotated[float, Range(gt=0, le=65536, works=4)] | None = None
    """memory for vLLM's KV cache in GiB, on a CPU rounded up to whole ones; when left out 1 on a
    CPU, and on a GPU vLLM's own choice"""
    threads: Annotated[int, Range(ge=1, le=4096, works=4)] | None = None
    """CPU threads; as many as there are cores when left out"""
    seed: Annotated[int, Range(ge=0, le=2**32 - 1, works=0)] = 0
    """seed of the sampling"""
    output_dir: str | None = None
    """new folder for result.json and completions.jsonl; runs/evaluate-DATE-TIME when left out"""

    def check(self) -> None:
        """Raises UserError for values that cannot work. Not done on construction: the parser would
        turn the message into a box of its own."""
        check_values(self)
        lookup.require("--model", self.model.removeprefix("random:"))
        lookup.require("--result-path", self.result_path or ".")
        for entry in self.dataset:
            lookup.require("--dataset", entry)
            dataset, name = split_name(entry)
            if name is not None:
                require_name("--dataset", dataset, name)
        if 0 < self.temperature < 0.01:
            raise UserError(
                f"--temperature is {self.temperature}; it must be 0 (greedy) or between 0.01 and "
                "10; 0.6 works"
            )
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
            if asked and field.name not in OF_GRADING:
                raise UserError(
                    "--result-path grades completions of an earlier evaluation again, "
                    f"{flag(field.name)} is for asking a model: leave one of the two out"
                )


def parse(args: Sequence[str] | None = None) -> EvalSettings:
    """Settings from the command line, not yet checked. Raises UserError for an unknown flag, naming
    the nearest one, and for a value of another kind."""
    import tyro

    args = list(sys.argv[1:] if args is None else args)
    prog = "python -m polymath_fast.evaluate"
    hints = get_type_hints(EvalSettings, include_extras=True)
    refuse_unknown(args, hints, prog)
    refuse_unreadable(args, hints)
    return tyro.cli(
        EvalSettings,
        args=joined(args, hints),
        prog=prog,
        description="Score a model on files of problems: mean@k and pass@k with 95 % intervals.",
    )
