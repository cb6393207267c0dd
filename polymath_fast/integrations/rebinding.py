"""Replacing a trainer's functions by ours, everywhere that it holds them, and back."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

from polymath_fast.errors import UserError


class Patch:
    """A package with replaced functions, until `undo()` or the end of a with block."""

    def __init__(self, package: str, pairs: dict[Any, Any]) -> None:
        """`pairs`: their function -> ours."""
        self._package, self._pairs = package, pairs
        _rebind(package, pairs)

    def undo(self) -> None:
        """Give the package its own functions back, also where it was given ours since then."""
        pairs, self._pairs = self._pairs, {}
        _rebind(self._package, {ours: theirs for theirs, ours in pairs.items()})

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def check_replaceable(
    module: ModuleType, name: str, parameters: list[str], look: Callable[[Any], Any] = lambda f: f
) -> Any:
    """`module.name`, if `look(module.name)` takes exactly `parameters`.

    Raises:
        UserError: it is missing, takes others, or was replaced by us already.
    """
    theirs = getattr(module, name, None)
    if getattr(theirs, "polymath_fast", False):
        raise UserError(
            f"{module.__name__}.{name} is replaced already; call undo() on that handle first"
        )
    found = None if theirs is None else list(inspect.signature(look(theirs)).parameters)
    if found != parameters:
        raise UserError(
            f"{module.__name__}.{name} takes {found}, polymath_fast knows {parameters}; "
            "docs/integrations.md names the versions that work"
        )
    return theirs


def ours(function: Any) -> Any:
    """Mark a replacement, so that it is not replaced again."""
    function.polymath_fast = True
    return function


def _rebind(package: str, pairs: dict[Any, Any]) -> None:
    """In every module of `package` that is loaded, the keys of `pairs` become its values."""
    by_identity = {id(old): new for old, new in pairs.items()}
    for name, module in list(sys.modules.items()):
        if module is not None and name.split(".")[0] == package:
            for attribute, value in list(vars(module).items()):
                if id(value) in by_identity:
                    setattr(module, attribute, by_identity[id(value)])
