"""A user's reward function, served inside a worker process: loaded once, called per batch, its
result checked where it still has its type."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from polymath_fast.rewards.contract import validated


def start(options: dict[str, str]) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], Any]:
    """Loads `options["module"]` (a path ending in .py, or a module's name) and finds
    `options["function"]` in it. The greeting says what the function accepts or what went wrong."""
    try:
        module = _load(options["module"])
        function = getattr(module, options["function"], None)
        if not callable(function):
            return _unusable, {"error": _missing(module, options["function"])}
        return _Handler(function, options["module"]), _accepted(function)
    except BaseException as error:
        # a script may call sys.exit at import; the run is told, not ended
        return _unusable, {"error": _describe(error, options["module"])}


def _unusable(request: dict[str, Any]) -> dict[str, Any]:
    return {"failed": "the function could not be loaded"}


def _load(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _missing(module: ModuleType, name: str) -> str:
    functions = [
        key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"
    ]
    there = f"it defines {', '.join(functions[:8])}" if functions else "it defines no function"
    return f"there is no function {name!r} in it; {there}"


def _accepted(function: Callable[..., Any]) -> dict[str, Any]:
    """Names of the parameters it can be given; `any` when it takes **columns."""
    parameters = inspect.signature(function).parameters.values()
    usable = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {
        "any": any(p.kind is p.VAR_KEYWORD for p in parameters),
        "names": [p.name for p in usable],
        "required": [p.name for p in parameters if p.default is p.empty and p.kind not in _STARS],
    }


_STARS = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


class _Handler:
    def __init__(self, function: Callable[..., Any], file: str) -> None:
        self.function, self.file = function, file
        self.loop = asyncio.Runner()  # one for all calls: clients that are kept belong to a loop

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"rewards": [...]}, {"invalid": what it returned} or {"failed": what it raised}."""
        try:
            returned = self.function(**request["arguments"])
            if inspect.iscoroutine(returned):
                returned = self.loop.run(returned)
        except BaseException as error:
            # KeyboardInterrupt and SystemExit too: nothing the function does ends the run
            return {"failed": _describe(error, self.file)}
        try:
            return {"rewards": validated(returned, request["expected"])}
        except ValueError as error:
            return {"invalid": str(error)}


def _describe(error: BaseException, file: str) -> str:
    """ "ValueError: could not convert ... (reward.py line 12)", the line being the user's."""
    name = Path(file).name if file.endswith(".py") else file.rpartition(".")[2] + ".py"
    lines = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == name]
    where = f" ({name} line {lines[-1].lineno})" if lines else ""
    text = " ".join(traceback.format_exception_only(error)[-1].split())
    if isinstance(error, SyntaxError):
        where = f" ({Path(error.filename or file).name} line {error.lineno})"
    return f"{text[:500]}{where}"
