"""Builds csrc with nvcc where there is one; everything else is in pyproject.toml.

The CUDA kernels are plain shared libraries with a C interface, so neither torch nor a GPU is needed
here. POLYMATH_FAST_SKIP_CUDA=1 leaves them out; POLYMATH_FAST_CUDA_ARCHS chooses architectures.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(ROOT.glob("csrc/*.cu"))
ARCHS = os.environ.get("POLYMATH_FAST_CUDA_ARCHS", "80;90;100").split(";")


def find_nvcc() -> str | None:
    """The compiler, where there is one and it is wanted."""
    skipped = not SOURCES or os.environ.get("POLYMATH_FAST_SKIP_CUDA") == "1"
    return None if skipped else shutil.which("nvcc")


def command(nvcc: str, source: Path, library: Path) -> list[str]:
    """Machine code for every architecture, and PTX of the newest for those to come."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    newest = max(ARCHS, key=lambda arch: int(arch.rstrip("af")))
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    options = ["-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", "--threads=0"]
    return [nvcc, *options, *codes, "-o", str(library), str(source)]


class BuildWithCuda(build_py):
    """Puts one lib<operator>.so per csrc/<operator>.cu beside the package's Python files."""

    def run(self) -> None:
        super().run()
        nvcc = find_nvcc()
        if nvcc is None:
            return
        # An editable install imports the package from the checkout, not from build_lib.
        top = ROOT if self.editable_mode else Path(self.build_lib)
        target = top / "polymath_fast" / "lib"
        target.mkdir(parents=True, exist_ok=True)
        for source in SOURCES:
            # Linked under another name first: a running process may have the old file mapped.
            unfinished = target / f"{source.stem}.{os.getpid()}.tmp"
            subprocess.run(command(nvcc, source, unfinished), check=True)
            unfinished.replace(target / f"lib{source.stem}.so")


class WheelOfThisPlatform(bdist_wheel):
    """A wheel with compiled kernels is for one platform and any Python: they link to neither."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = find_nvcc() is None

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithCuda, "bdist_wheel": WheelOfThisPlatform})
