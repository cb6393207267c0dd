"""python -m polymath_fast.evaluate: mean@k and pass@k of a model on files of problems.

Completions are kept as they were sampled; --result-path grades an earlier evaluation again, without
a model. `--help` lists the flags.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, where Ctrl-C would be a traceback
    from polymath_fast import start

    start.run("polymath_fast.evaluate")

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from polymath_fast import environment, machine, models, precision, rollout
from polymath_fast.config.settings import DEFAULT_SAMPLE
from polymath_fast.errors import EngineError, UserError
from polymath_fast.evaluation import problem_files, result_folder
from polymath_fast.evaluation.grading import EvalResult, evaluate_samples
from polymath_fast.evaluation.problem_files import EvalProblem, Grading
from polymath_fast.evaluation.settings import OF_GRADING, EvalSettings, parse
from polymath_fast.folders import asking
from polymath_fast.monitor.console import print_error
from polymath_fast.samples import Sample, load_tokenizer, ready, sources

_COMPLETIONS_AT_ONCE = 2048


class _Chosen(NamedTuple):
    """What samples, where, and in which type."""

    engine: str
    device: str
    dtype: str


def evaluate(settings: EvalSettings) -> dict[str, EvalResult]:
    """Does what `settings` say, writes the output folder and returns the results by source.

    Raises UserError and EngineError.
    """
    settings.check()
    grading = Grading(open_ended=settings.open_ended_sources, multiple_choice=settings.mcp_sources)
    if settings.result_path is not None:
        return _regrade(settings, grading)
    problems = _problems(settings, grading)
    environment.prepare()
    chosen = _choose(settings)
    model_dir = models.resolve_model(settings.model, settings.revision)
    tokenizer = load_tokenizer(model_dir)
    context = models.context_length(model_dir)
    asked = _ask(problems, settings, tokenizer, context)
    if note := asking.difference(Path(model_dir).resolve(), settings):
        print(note)
    folder = result_folder.new_folder(settings.output_dir)
    results: dict[str, EvalResult] = {}
    with ExitStack() as stack:
        grader = stack.enter_context(result_folder.grader(settings.reward_timeout))
        engine = _start_engine(settings, chosen, model_dir, tokenizer, asked)
        stack.callback(engine.close)
        for source, samples in asked.items():
            parts = []
            for part in _parts(engine, tokenizer, source, samples, settings, grader.score):
                result_folder.write_rows(folder / result_folder.COMPLETIONS, part.rows)
                parts.append(part)
                done = sum(len(part.per_problem) for part in parts)
                print(f"{source}: {done} of {len(samples)} problems", flush=True)
            results[source] = _joined(parts)
    result_folder.write_result(folder, asdict(settings), results)
    print(f"{table(results)}\n{folder / result_folder.RESULT}")
    return results


def _regrade(settings: EvalSettings, grading: Grading) -> dict[str, EvalResult]:
    path = Path(settings.result_path or "")
    with result_folder.grader(settings.reward_timeout) as grader:
        results = result_folder.regrade(path, grading, grader)
    folder = result_folder.new_folder(settings.output_dir)
    for result in results.values():
        result_folder.write_rows(folder / result_folder.COMPLETIONS, result.rows)
    # the completions are the earlier evaluation's: of the settings only those of grading are new
    grading_alone = {name: getattr(settings, name) for name in OF_GRADING}
    made_with = result_folder.settings_of(path) | grading_alone
    result_folder.write_result(folder, made_with, results, regraded_from=path)
    print(f"{table(results)}\n{folder / result_folder.RESULT}")
    return results


def _problems(settings: EvalSettings, grading: Grading) -> list[EvalProblem]:
    entries = settings.dataset
    if not entries:
        entries = (sources.held_out(DEFAULT_SAMPLE) or DEFAULT_SAMPLE,)
        print(f"no --dataset is given: evaluating {entries[0]}")
    problems: list[EvalProblem] = []
    for entry in entries:
        found = problem_files.read(entry, settings.dataset_split, grading)
        new = found[: settings.max_problems]
        shared = {problem.source for problem in new} & {problem.source for problem in problems}
        if shared:
            name = sorted(shared)[0]
            raise UserError(
                f"--dataset {entry}: there is a source {name!r} already; name one of them, e.g. "
                f"{sources.split_name(entry)[0]}={sources.usable_name(name)}_2"
            )
        problems += new
    grading.require_known({problem.source for problem in problems})
    return problems


def _ask(
    problems: Sequence[EvalProblem], settings: EvalSettings, tokenizer: Any, context: int | None
) -> dict[str, list[Sample]]:
    """The problems as prompts, by source."""
    samples = ready(
        [item.problem for item in problems],
        template=settings.template,
        instruction=settings.instruction,
        tokenizer=tokenizer,
        max_completion_length=settings.max_completion_length,
        context_length=context,
    )
    asked: dict[str, list[Sample]] = {}
    for item, sample in zip(problems, samples, strict=True):
        columns = {"letter": item.letter, "letters": item.letters}
        asked.setdefault(item.source, []).append(replace(sample, columns=columns))
    return asked


def _choose(settings: EvalSettings) -> _Chosen:
    """Says what samples. Raises UserError for what is not possible here."""
    device = machine.device(settings.device)
    engine, reason = rollout.choose_engine(settings.engine, settings.kv_cache_gib)
    print(f"engine: {engine} ({reason})", flush=True)
    dtype, reason = precision.choose_dtype(settings.dtype, device)
    print(f"weights: {dtype} ({reason})", flush=True)
    if engine == "vllm":
        from polymath_fast.rollout.vllm_process import require_usable

        require_usable(dtype, device)
    return _Chosen(engine, device, dtype)


def _start_engine(
    settings: EvalSettings,
    chosen: _Chosen,
    model_dir: Path,
    tokenizer: Any,
    asked: dict[str, list[Sample]],
) -> rollout.Engine:
    import torch

    torch.set_num_threads(settings.threads or machine.cores())
    everything = [sample for samples in asked.values() for sample in samples]
    longest = max(len(sample.prompt_ids) for sample in everything)
    return rollout.build_engine(
        chosen.engine,
        model_dir=model_dir,
        policy=None,
        stop_token_ids=rollout.stop_token_ids(model_dir, tokenizer),
        max_model_len=longest + settings.max_completion_length,
        max_num_seqs=rollout.max_num_seqs(
            settings.k * len(everything), chosen.engine, chosen.device
        ),
        device=chosen.device,
        dtype=chosen.dtype,
        seed=settings.seed,
        kv_cache_gib=settings.kv_cache_gib,
        threads=settings.threads,
    )


def _parts(
    engine: rollout.Engine,
    tokenizer: Any,
    source: str,
    samples: Sequence[Sample],
    settings: EvalSettings,
    score: Any,
) -> Iterator[EvalResult]:
    """Some problems at a time, so that completions are on disk before the last one is sampled."""
    size = max(1, _COMPLETIONS_AT_ONCE // settings.k)
    for start in range(0, len(samples), size):
        chosen = samples[start : start + size]
        part = evaluate_samples(
            engine,
            tokenizer,
            chosen,
            k=settings.k,
            temperature=settings.temperature,
            max_completion_length=settings.max_completion_length,
            seed=settings.seed + start,
            score=score,
        )
        rows = [
            {
                "source": source,
                **row,
                "index": start + row["index"],
                **chosen[row["index"]].columns,
            }
            for row in part.rows
        ]
        yield EvalResult(rows=rows, timeouts=part.timeouts)


def _joined(parts: Sequence[EvalResult]) -> EvalResult:
    return EvalResult(
        rows=[row for part in parts for row in part.rows],
        timeouts=sum(part.timeouts for part in parts),
    )


def table(results: dict[str, EvalResult]) -> str:
    """The figures of every source as lines of text."""
    lines = [("source", "problems", "k", "mean@k", "pass@k", "cut off", "tokens")]
    for source, result in results.items():
        solved = str(result.pass_at(result.k)) if result.k > 1 else "-"
        lines.append(
            (
                source,
                str(len(result.per_problem)),
                str(result.k),
                str(result.mean),
                solved,
                f"{result.truncated_ratio:.1%}",
                f"{result.mean_length:.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(args: Sequence[str] | None = None) -> int:
    """Parse the command line and evaluate; 2 for what the user can mend, 1 when the engine died."""
    try:
        evaluate(parse(args))
    except UserError as error:
        print_error(error)
        return 2
    except EngineError as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print("stopped; problems counted above are in the output folder", file=sys.stderr)
        return 130
    return 0
