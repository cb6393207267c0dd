"""Compile kernels ahead of time, on a machine without a GPU, and read what they use of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DIVISIBLE = [["tt.divisibility", 16]]
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")

_UNITS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
"""matrix instructions of Blackwell, Hopper and Ampere"""


@dataclass(frozen=True)
class Variant:
    """A kernel and one way in which a launcher calls it."""

    name: str
    kernel: Any
    types: dict[str, str]
    """argument -> Triton type; "i32:16" and "*bf16:16" are divisible by 16"""
    constants: dict[str, Any]
    """constexpr arguments, and arguments that a launcher passes as None or 1"""
    warps: int = 4
    stages: int = 3
    capabilities: tuple[int, ...] = (80, 90, 100)
    matrix: bool | None = False
    """whether it is a matrix product, which must use the newest units for it; None: any will do"""
    programs: int = 1
    """that must fit on a multiprocessor at once"""
    registers: int | None = None
    """upper bound given to the compiler"""


def compile_variant(variant: Variant, capability: int) -> Any:
    """The compiled kernel for compute capability `capability` / 10."""
    names = variant.kernel.arg_names
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        kind, _, divisible = variant.types[name].partition(":")
        signature[name] = kind
        if divisible:
            attributes[(index,)] = DIVISIBLE
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(variant.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    if variant.registers is not None:
        options["maxnreg"] = variant.registers
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any) -> dict[str, int | str]:
    """Registers, stack and local bytes a thread, shared bytes a program; its matrix units.

    What ptxas spills from registers lies on the stack; a kernel without stack spills nothing.
    """
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        found = usage(usage_report(Path(cubin.name)))
    return found | {
        "shared": compiled.metadata.shared,
        "matrix": next((unit for unit in _UNITS if unit in ptx), ""),
    }


def usage_report(binary: Path) -> str:
    """What cuobjdump says about the kernels of a cubin or of a library."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "-res-usage", binary]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(report: str) -> dict[str, int]:
    """Registers, stack and local bytes of the first kernel in a report."""
    found = _USAGE.search(report)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{report}")
    registers, stack, _, local = (int(number) for number in found.groups())
    return {"registers": registers, "stack": stack, "local": local}
