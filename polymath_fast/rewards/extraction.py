"""Finding the answer in a completion: boxed, then "answer is", then the last number.

Completions are written by a policy that is paid for confusing this file, so every scan is linear
in the text: no nested quantifiers, no recursion, no conversion of digits.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque

_TIDY = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms
# a blank before, since 2\u00bd is two and a half
_TIDY |= {
    ord(fraction): f" {unicodedata.normalize('NFKC', fraction).replace(chr(0x2044), '/')}"
    for fraction in map(chr, (*range(0xBC, 0xBF), *range(0x2150, 0x215F)))
}
_TIDY |= {0x2044: "/", 0x2212: "-", 0x2013: "-", 0x3000: " ", 0x00A0: " ", 0x2009: " ", 0x202F: " "}
# NUL, zero-width and direction controls: invisible, so they must not decide a comparison
_TIDY |= dict.fromkeys([0, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F)])
_TIDY |= dict.fromkeys(range(0x2066, 0x206A))

_SYMBOLS = {
    "\u03c0": r"\pi ",
    "\u03b8": r"\theta ",
    "\u221e": r"\infty ",
    "\u00d7": r"\times ",
    "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ",
    "\u00f7": r"\div ",
    "\u00b1": r"\pm ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u2208": r"\in ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2205": r"\emptyset ",
}
_TO_LATEX = str.maketrans(_SYMBOLS)
_RAISED = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207f", "0123456789-n"
)
_EXPONENT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b\u207f]+")
_ROOT = re.compile(r"\u221a\s*(?:\(([^()\u221a]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z]))")
_BRACES = re.compile(r"\\(?:boxed|fbox)[ \t\n]*\{|\\(?!\\f?box).|[{}]", re.DOTALL)
_ANSWER_IS = re.compile(r"answer(?: is)?[ \t]*:|answer is", re.IGNORECASE)
_NUMBER_BODY = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    r"[-+]?\\[dt]?frac\{-?[0-9]+\}\{[0-9]+\}"
    rf"|(?:(?<![\w.)}}\]])[-+])?(?<![\w.])(?:{_NUMBER_BODY})(?:/[0-9]+)?"
)
_DELIMITED = re.compile(r"\$\$?([^$]+)\$|\\\(([^\n]*?)\\\)|\\\[([^\n]*?)\\\]")
_LEADING_NUMBER = re.compile(rf"(?:[A-Za-z]\w?[ ]*=[ ]*)?\\?\$?[ ]*([-+]?(?:{_NUMBER_BODY}))")
_PROSE = re.compile(r"[A-Za-z ,;'()%.!*]*")
_CHOICE_WRAPPING = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\b|\\?[()\[\]]|[{}$*]")
_CHOICE = re.compile(r"(?:[Oo]ption |[Cc]hoice )?(?:([A-Z])(?![A-Za-z0-9])|([a-z])$)")
_MAX_PHRASE = 300


def tidy(text: str) -> str:
    """`text` with full-width forms, fractions of one character and Unicode minus as ASCII, and
    invisible controls removed."""
    return text.translate(_TIDY) if "\0" in text or not text.isascii() else text


def spell(answer: str) -> str:
    r"""`answer` with mathematical characters as LaTeX: \sqrt{3}, x^{2}, \infty. For answers, not
    for whole texts, where an exponent would pass for the last number."""
    if answer.isascii():
        return answer
    text = _EXPONENT.sub(lambda found: f"^{{{found.group().translate(_RAISED)}}}", answer)
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2]}}}", text)
    return text.translate(_TO_LATEX)


def final_part(text: str) -> str:
    """What counts as the answer of a reasoning model: the text after the last `</think>`, or all
    of it when there is none."""
    return text.rpartition("</think>")[2]


def box_spans(text: str) -> list[tuple[int, int]]:
    r"""(start, end) of the content of every closed `\boxed{...}`, in order of opening; one pass."""
    open_braces: list[tuple[bool, int]] = []
    spans: list[tuple[int, int]] = []
    starts = [start for name in (r"\boxed", r"\fbox") if (start := text.find(name)) >= 0]
    # braces before the first box cannot close it
    for token in _BRACES.finditer(text, min(starts, default=len(text))):
        symbol = token.group()
        if symbol.endswith("{") and symbol != r"\{":
            open_braces.append((len(symbol) > 1, token.end()))
        elif symbol == "}" and open_braces:
            is_box, start = open_braces.pop()
            if is_box:
                spans.append((start, token.start()))
    return sorted(spans)


def last_box(text: str) -> str | None:
    r"""Content of the last closed, non-blank `\boxed{...}`; None when there is none.

    A box that was cut off is no box. A blank one is skipped: models quote `\boxed{}` from their
    instructions. Of nested boxes the innermost counts.
    """
    for start, end in reversed(box_spans(text)):
        content = text[start:end].strip()
        if content:
            return content
    return None


def extract_answer(completion: str) -> str | None:
    r"""The answer a completion commits to, as text; None when it has none.

    Order of the One-Shot-RLVR evaluation harness: last box, else the phrase after the last "answer
    is", else the last number. With a `</think>` only what follows it is read.
    """
    text = tidy(final_part(completion))
    box = last_box(text)
    phrase = _after_answer_is(text) if box is None else box
    return spell(phrase) if phrase else _last_number(text)


def _after_answer_is(text: str) -> str | None:
    marker = _last_match(_ANSWER_IS, text)
    if marker is None:
        return None
    phrase = text[marker.end() : marker.end() + _MAX_PHRASE].lstrip(" \t*:=")
    phrase = phrase.split("\n")[0]
    delimited = _DELIMITED.match(phrase)
    if delimited:
        return next(group for group in delimited.groups() if group is not None).strip()
    number = _LEADING_NUMBER.match(phrase)
    if number and _PROSE.fullmatch(_first_sentence(phrase[number.end() :])):
        return number.group(1)
    return _first_sentence(phrase).strip(" *.,;!") or None


def _first_sentence(phrase: str) -> str:
    return re.split(r"[.!?](?:\s|$)", phrase, maxsplit=1)[0]


def _last_number(text: str) -> str | None:
    number = _last_match(_NUMBER, text)
    return number.group() if number else None


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def extract_choice(completion: str, letters: str) -> str | None:
    r"""The option letter a completion commits to, upper case; None when it has none.

    The box (or the phrase after "answer is", or the whole of a one-word reply) must begin with one
    of `letters`, alone or followed by its text: "B", "(B)", "B. mitosis", "\text{B}", "b".
    """
    text = tidy(final_part(completion))
    phrase = last_box(text) or _after_answer_is(text) or (text if len(text) < 8 else "")
    phrase = _CHOICE_WRAPPING.sub(" ", phrase[:_MAX_PHRASE]).strip(" .,:")
    match = _CHOICE.match(phrase)
    if match is None:
        return None
    letter = (match.group(1) or match.group(2)).upper()
    return letter if letter in letters else None
