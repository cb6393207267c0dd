"""From a problem to the text a model is asked to continue."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING

from polymath_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = ("plain", "polymath")
"""templates that leave start tokens to the tokenizer; the others write their own control tokens"""
DEFAULT_INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."

# Some templates write today's date, which would give a resumed run another prompt. This is the
# day that Llama's own take where there is no clock.
_TODAY = datetime.date(2024, 7, 26)
# The exact wording is part of the recipe of arXiv 2601.03111 (after Open-Reasoner-Zero).
_POLYMATH = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. User: You must put your answer inside \\boxed{} and Your final answer "
    "will be extracted automatically by the \\boxed{} tag. For multiple choice questions, the "
    "final answer in \\boxed{} should be the option letter (A, B, C, D, etc.).\n"
    "%s\n"
    "Assistant:"
)
# The prompt type of that name in the evaluation of Qwen2.5-Math, which arXiv 2504.20571 uses.
_QWEN25_MATH_COT = (
    "<|im_start|>system\n"
    "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n"
    "%s<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def renderer(
    template: str, instruction: str | None, tokenizer: PreTrainedTokenizerBase
) -> Callable[[str], str]:
    """The function that turns a problem into prompt text by `template`.

    `instruction` follows the problem in the templates chat and plain (None: DEFAULT_INSTRUCTION,
    "": nothing); the others have their own. Raises UserError for an instruction that would be
    ignored, an unknown template, or a template that the tokenizer cannot serve.
    """
    if template in ("polymath", "qwen25-math-cot"):
        if instruction is not None:
            raise UserError(
                f"--instruction goes with --template chat or plain; {template} has its own: "
                "leave it out"
            )
        text = _POLYMATH if template == "polymath" else _QWEN25_MATH_COT
        if template == "qwen25-math-cot" and "<|im_start|>" not in tokenizer.get_vocab():
            raise UserError(
                "--template qwen25-math-cot is for models with the token <|im_start|>, which this "
                "one has not; --template chat or plain works"
            )
        return lambda problem: text % problem
    suffix = DEFAULT_INSTRUCTION if instruction is None else instruction
    if template == "plain":
        return lambda problem: f"{problem} {suffix}".strip() + "\n"
    if template == "chat":
        _require_chat_template(tokenizer)
        return lambda problem: render_chat(
            [{"role": "user", "content": f"{problem} {suffix}".strip()}], tokenizer
        )
    raise UserError(
        f"--template is {template!r}; it must be one of chat, plain, polymath, qwen25-math-cot"
    )


def _require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the tokenizer cannot render messages."""
    if not tokenizer.chat_template:
        raise UserError(
            "the model's tokenizer has no chat template, so it cannot take --template chat or "
            "prompts that are conversations; --template plain works with every model"
        )


def render_chat(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a conversation up to where the assistant's turn begins, the same on every day.
    Raises UserError."""
    from jinja2 import TemplateError

    _require_chat_template(tokenizer)
    clock = _stopped_clock() if "strftime_now" in str(tokenizer.chat_template) else nullcontext()
    try:
        with clock:
            return tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the model's chat template refuses these messages: {error}") from None


@contextmanager
def _stopped_clock() -> Iterator[None]:
    """Templates know their date from here: in 5.24 none is handed to them from outside."""
    from transformers.utils import chat_template_utils

    clock = chat_template_utils.datetime
    chat_template_utils.datetime = SimpleNamespace(now=lambda: _TODAY)
    try:
        yield
    finally:
        chat_template_utils.datetime = clock
