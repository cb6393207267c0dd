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
from setuptools.command.build_py import build_py

SOURCES = sorted(Path(__file__).parent.glob("csrc/*.cu"))
ARCHS = os.environ.get("POLYMATH_FAST_CUDA_ARCHS", "80;90;100").split(";")


class BuildWithCuda(build_py):
    """Puts one lib<operator>.so per csrc/<operator>.cu beside the package's Python files."""

    def run(self) -> None:
        super().run()
        nvcc = shutil.which("nvcc")
        if not SOURCES or nvcc is None or os.environ.get("POLYMATH_FAST_SKIP_CUDA") == "1":
            return
        target = Path(self.build_lib) / "polymath_fast" / "lib"
        target.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        for source in SOURCES:
            library = target / f"lib{source.stem}.so"
            command = [nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", *codes]
            subprocess.run([*command, "-o", str(library), str(source)], check=True)


setup(cmdclass={"build_py": BuildWithCuda})
