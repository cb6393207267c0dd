"""Triton's interpreter, watched for races, without what it does to no effect, half of its time.

It exchanges the functions of `triton.language` when a kernel is launched, and looks through the
whole module once more at every call of a device function, when they are exchanged already. It looks
for overflow in every sum and product, and reports none: assertions are off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import races
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

assert triton.knobs.runtime.interpret, "run with TRITON_INTERPRET=1"


@cache
def _languages(fn: Callable[..., Any]) -> tuple[ModuleType, ...]:
    return tuple(x for x in fn.__globals__.values() if x is tl or x is tl.core)


def interpret() -> None:
    """From here on in this process, where memory that nobody has written holds NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    races.watch()
    exchange, options = interpreter._patch_lang, interpreter.interpreter_builder.options
    assert not options.debug, "overflow would be reported"

    def exchange_once(fn: Callable[..., Any]) -> Any:
        languages = _languages(fn)
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return exchange(fn)

    interpreter._patch_lang = exchange_once
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
