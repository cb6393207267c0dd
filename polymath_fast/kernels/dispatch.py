"""Which implementation of an operator runs, and why.

`choose` is a pure function of its arguments, so that every rule is testable without a GPU. A new
implementation is a file in the operator's folder plus its name in `IMPLEMENTATIONS`.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, ParamSpec, TypeVar

import torch

FILES = {
    "reference": "reference",
    "cpu": "_cpu",
    "triton": "_triton",
    "cuda": "_cuda",
    "flash": "_flash",
}
"""implementation -> module inside kernels/<operator>/"""

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "group_advantages": ("triton", "cpu", "reference"),
    "token_logprobs": ("triton", "cpu", "reference"),
    "linear_logprobs": ("triton", "cpu", "reference"),
    "grpo_loss": ("triton", "cpu", "reference"),
    "linear_grpo_loss": ("triton", "cpu", "reference"),
    "prefix_attention": ("flash", "triton", "cpu", "reference"),
    "weight_sync": ("cuda", "triton", "cpu", "reference"),
    "flat_adamw": ("triton", "cpu", "reference"),
    "layer_rows": ("triton", "cpu", "reference"),
}
"""operator -> what exists for it, fastest first"""

P, R = ParamSpec("P"), TypeVar("R")
ENVIRONMENT = "POLYMATH_FAST_IMPL"
_HALF_AND_SINGLE = (torch.bfloat16, torch.float16, torch.float32)
_default: ContextVar[str | None] = ContextVar("polymath_fast_impl", default=None)


@contextmanager
def use(impl: str) -> Iterator[None]:
    """Make `impl` the default of every operator inside the block (this thread or task only).

    An operator that has no such implementation keeps choosing for itself.
    """
    check_name(impl, "kernels.use")
    token = _default.set(impl)
    try:
        yield
    finally:
        _default.reset(token)


def choose(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
    default: str | None = None,
    capability: tuple[int, int] | None = None,
    built: bool | None = None,
    flash_attn: bool | None = None,
    unable: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, str]:
    """The implementation of `op` that runs on these inputs, and the reason in words.

    Args:
        op: name of an operator, a key of `IMPLEMENTATIONS`.
        device, dtype: of the operator's main input.
        impl: what the caller asked for; "auto" leaves it open.
        default: what `use` or POLYMATH_FAST_IMPL asked for; binding where `op` has it.
        capability: CUDA compute capability of the device, None when it has none.
        built: whether csrc/<op>.cu has been compiled; None looks for the file.
        flash_attn: whether that library is installed; None looks for it.
        unable: implementation -> why it cannot do what is asked of `op` in this call.

    Raises:
        ValueError: an implementation was asked for that does not exist or cannot run here.
    """
    device = torch.device(device)
    existing = IMPLEMENTATIONS[op]
    check_name(impl, "impl")
    asked = impl

    def refuse(name: str) -> str | None:
        found = _refusal(op, name, device, dtype, capability, built, flash_attn)
        return unable.get(name) if found is None else found

    if asked == "auto" and default is not None and default in existing:
        asked = default
    if asked != "auto":
        refusal = refuse(asked)
        if refusal:
            raise ValueError(f"{op}: impl={asked!r} is not possible here: {refusal}; use 'auto'")
        return asked, f"asked for {asked!r}"
    refusals = []
    for candidate in existing:
        refusal = refuse(candidate)
        if refusal is None:
            because = "; ".join(refusals) or f"the fastest one for {device.type} tensors"
            return candidate, because
        refusals.append(f"{candidate}: {refusal}")
    raise ValueError(f"{op}: nothing runs on {device.type} {dtype}: {'; '.join(refusals)}")


def resolve(
    op: str, tensor: torch.Tensor, impl: str, unable: Mapping[str, str] = MappingProxyType({})
) -> ModuleType:
    """The module that implements `op` for `tensor`, honouring `use` and POLYMATH_FAST_IMPL.

    Falling back to the reference on a CUDA tensor is allowed but slow, so it warns, once.
    RuntimeError inside of torch.func's transforms, whose tensors have no memory to read.
    """
    name, reason = choose_here(op, tensor.device, tensor.dtype, impl, unable)
    if name != "reference" and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{op} does not run inside of torch.func (grad, vmap, jvp, ...): take backward() or "
            "torch.autograd.grad, and rows in place of vmap"
        )
    on_cuda = tensor.device.type == "cuda"
    if on_cuda and name == "reference" and not reason.startswith("asked"):
        _warn_once(op, reason)
    return importlib.import_module(f"polymath_fast.kernels.{op}.{FILES[name]}")


def choose_here(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype,
    impl: str = "auto",
    unable: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, str]:
    """`choose` with the defaults and the device of this process."""
    default, device = default_implementation(), torch.device(device)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return choose(
        op, device, dtype, impl=impl, default=default, capability=capability, unable=unable
    )


def default_implementation() -> str | None:
    """What `use` or POLYMATH_FAST_IMPL asks for, if anything. Raises ValueError for no name."""
    default = _default.get() or os.environ.get(ENVIRONMENT) or None
    if default is not None:
        check_name(default, ENVIRONMENT)
    return default


def library_path(op: str) -> Path:
    """Where setup.py puts the compiled csrc/<op>.cu."""
    return Path(__file__).parents[1] / "lib" / f"lib{op}.so"


def untraced(
    function: Callable[P, R] | None = None, *, within: Callable[P, R] | None = None
) -> Any:
    """Keep torch.compile from tracing into an operator.

    torch.compiler.disable as a decorator would import the compiler, which takes seconds; this does
    so only where the compiler is at work already.

    within: the same operator in a form that stays inside a graph; without one the graph breaks, and
        the operator runs as it is.
    """
    if function is None:
        return functools.partial(untraced, within=within)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if within is not None:
            return within(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)

    return call


def wants_gradient(*values: Any) -> bool:
    """Whether autograd follows any of the tensors among `values`."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _refusal(
    op: str,
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    built: bool | None,
    flash_attn: bool | None,
) -> str | None:
    """Why `impl` of `op` cannot run on these inputs; None when it can."""
    if impl not in IMPLEMENTATIONS[op]:
        return f"{op} has only {', '.join(IMPLEMENTATIONS[op])}"
    if impl == "reference":
        return None
    if dtype not in _HALF_AND_SINGLE:
        return f"{dtype} inputs (bfloat16, float16 and float32 work)"
    if impl == "cpu":
        return None if device.type == "cpu" else f"the tensors are on {device.type}"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if capability is not None and capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if impl == "cuda" and not (library_path(op).is_file() if built is None else built):
        return f"csrc/{op}.cu is not compiled (pip install -e . with nvcc on the PATH does it)"
    if impl == "flash" and dtype == torch.float32:
        return "float32 inputs (bfloat16 and float16 work)"
    if impl == "flash" and not (has_flash_attn() if flash_attn is None else flash_attn):
        return "flash-attn is not installed (pip install 'polymath-fast[flash-attn]')"
    return None


@functools.cache
def has_flash_attn() -> bool:
    """Whether the functions are there that "flash" calls. flash-attn-4 installs itself under the
    same name without them."""
    found = find_spec("flash_attn")
    folders = (found.submodule_search_locations or ()) if found is not None else ()
    return any((Path(folder) / "flash_attn_interface.py").is_file() for folder in folders)


def check_name(impl: str, where: str) -> None:
    """Raise ValueError unless `impl` is "auto" or names an implementation; `where` it stands."""
    if impl != "auto" and impl not in FILES:
        raise ValueError(f"{where}={impl!r}: must be one of auto, {', '.join(FILES)}")


@functools.cache
def _warn_once(op: str, reason: str) -> None:
    warnings.warn(f"{op} runs its slow reference on a CUDA tensor ({reason})", stacklevel=4)
