"""The one sample, or the few, that a run learns from: read, checked, rendered, tokenised once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath_fast.errors import UserError
from polymath_fast.samples import problems, prompts, sources
from polymath_fast.samples.problems import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from polymath_fast.config import Config


@dataclass(frozen=True)
class Sample:
    """One problem with its right answer, ready to be asked."""

    problem: str
    """the question; of a conversation, its last user turn"""
    answer: str
    prompt: str
    """rendered text, for people and rewards"""
    prompt_ids: tuple[int, ...]
    """what the model is given"""
    columns: dict[str, Any] = field(default_factory=dict)
    """the row's other columns, which reward functions may ask for"""


def from_config(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None = None,
    dataset: str | None = None,
    asked: str | None = None,
    notify: Callable[[str], None] = print,
) -> list[Sample]:
    """The samples a run trains on, or with `dataset` all of another set, asked in the same way;
    `asked` is the flag with its value that wants that set, for messages."""
    other = dataset is not None
    return load_samples(
        question=None if other else config.question,
        answer=None if other else config.answer,
        dataset=dataset if other else config.dataset,
        dataset_split=config.dataset_split,
        max_samples=None if other else config.max_samples,
        template=config.template,
        instruction=config.instruction,
        tokenizer=tokenizer,
        max_completion_length=config.max_completion_length,
        context_length=context_length,
        asked=asked,
        notify=notify,
    )


def load_samples(
    *,
    question: str | None,
    answer: str | None,
    dataset: str | None,
    dataset_split: str,
    max_samples: int | None,
    template: str,
    instruction: str | None,
    tokenizer: PreTrainedTokenizerBase,
    max_completion_length: int,
    context_length: int | None = None,
    asked: str | None = None,
    notify: Callable[[str], None] = print,
) -> list[Sample]:
    """Read samples from `question` and `answer`, or from `dataset`; at least one comes back.

    What a row holds is told in problems.parse, what a template does in prompts.renderer; a prompt
    that is a conversation goes through the model's chat template as it is. Identical rows are one
    sample, which `notify` is told. `context_length` is the model's number of positions, see
    `ready`. Raises UserError naming the file and the row, and `asked` (a flag with its value),
    which is --dataset when left out.
    """
    if question is not None:
        rows = iter([("--question", {"problem": question, "answer": answer})])
    elif dataset is not None:
        rows = sources.read_rows(dataset, dataset_split, asked)
    else:
        raise UserError("there is no sample; give --question and --answer, or --dataset")
    distinct = _distinct((problems.parse(where, row) for where, row in rows), dataset, notify)
    chosen = list(itertools.islice(distinct, max_samples))
    if not chosen:
        asked = asked or f"--dataset {dataset}"
        raise UserError(f"{asked} is empty; one problem with its answer is enough")
    if any(problem.messages for problem in chosen) and (template != "chat" or instruction):
        notify(
            f"{dataset}: conversations go through the model's chat template as they are, so "
            "--template and --instruction do not touch them"
        )
    return ready(
        chosen,
        template=template,
        instruction=instruction,
        tokenizer=tokenizer,
        max_completion_length=max_completion_length,
        context_length=context_length,
    )


def ready(
    asked: Sequence[Problem],
    *,
    template: str,
    instruction: str | None,
    tokenizer: PreTrainedTokenizerBase,
    max_completion_length: int,
    context_length: int | None = None,
) -> list[Sample]:
    """The problems, one at least, as they are put to a model, to train it or to score it.

    Raises UserError for text that looks like a control token, what the template cannot render, and
    the longest prompt if it leaves no room for `max_completion_length` tokens.
    """
    control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    bare = any(problem.messages is None for problem in asked)
    render = prompts.renderer(template, instruction, tokenizer) if bare else None
    samples = []
    for problem in asked:
        _check_control_tokens(problem, control)
        if problem.messages is None and render is not None:
            text, finished = render(problem.text), template not in prompts.UNFINISHED
        else:
            text, finished = prompts.render_chat(problem.messages or (), tokenizer), True
        ids = _tokenise(text, finished, tokenizer)
        samples.append(Sample(problem.text, problem.answer, text, ids, problem.columns))
    lengths = [len(sample.prompt_ids) for sample in samples]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    _check_length(asked[longest].where, lengths[longest], max_completion_length, context_length)
    return samples


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; never runs code from it. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{model_dir}: its tokenizer cannot be loaded ({str(error).splitlines()[0]}); "
            "save one there with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{model_dir}: the tokenizer has no end-of-sequence token, so completions could never "
            "end; set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def _distinct(
    rows: Iterable[Problem], dataset: str | None, notify: Callable[[str], None]
) -> Iterator[Problem]:
    """The problems that can be learnt from, without repetitions, in order of first appearance."""
    seen: set[str] = set()
    total = 0
    for problem in rows:
        if not problem.answer:
            notify(f"{problem.where}: the answer is empty, so this row is left out")
            continue
        total += 1
        key = problem.key()
        if key not in seen:
            seen.add(key)
            yield problem
    if total > len(seen):
        notify(
            f"{dataset}: {total} rows, {len(seen)} of them distinct, and each such is a sample; "
            "--groups-per-step says how many groups a step asks"
        )


def _tokenise(text: str, finished: bool, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of prompt text; one that is not `finished` gets the model's start tokens."""
    ids = tokenizer.encode(text, add_special_tokens=not finished, verbose=False)
    # Some tokenizers also close the text, which would end the completion before it begins.
    if not finished and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return tuple(ids)


def _check_control_tokens(problem: Problem, control: set[str]) -> None:
    text = problem.written()
    found = next((token for token in sorted(control) if token in text), None)
    if found is not None:
        raise UserError(
            f"{problem.where}: the problem contains {found!r}, which this model reads as a control "
            "token and not as text; take it out"
        )


def _check_length(where: str, prompt: int, completion: int, context: int | None) -> None:
    if context is None or prompt + completion <= context:
        return
    room = context - prompt
    advice = (
        f"--max-completion-length {room} works"
        if room > 0
        else "shorten the prompt, or take a model with more positions"
    )
    raise UserError(
        f"{where}: the prompt has {prompt} tokens; with --max-completion-length {completion} that "
        f"is {prompt + completion}, but the model has {context} positions; {advice}"
    )
