"""The reward of the whole-step benchmark: graded, so that hardly any batch has nothing to learn.

`mentioned` is for batches of which most have nothing.
"""

from __future__ import annotations


def boxed_or_mentioned(completions: list[str], answer: list[str], **_: object) -> list[float]:
    r"""1.0 for the answer in `\boxed{}`, 0.3 for the answer anywhere, and up to 0.1 for brevity."""
    return [score(text, right) for text, right in zip(completions, answer, strict=True)]


def mentioned(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1.0 for the answer anywhere."""
    return [float(right in text) for text, right in zip(completions, answer, strict=True)]


def score(text: str, right: str) -> float:
    """The reward of one completion."""
    brevity = 0.1 / (1 + len(text) / 100)
    if f"\\boxed{{{right}}}" in text:
        return 1.0 + brevity
    return 0.3 * (right in text) + brevity
