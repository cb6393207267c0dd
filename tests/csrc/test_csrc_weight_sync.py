"""csrc/weight_sync.cu without a GPU: it compiles, uses what the table says, and its code is right.

`python tests/csrc/test_csrc_weight_sync.py` writes the table; run it after a change of the kernel,
and read the difference before committing it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "kernels"))

from weight_sync_cases import PAIRS, check, layouts  # noqa: E402

from polymath_fast.kernels.triton import aot  # noqa: E402
from polymath_fast.kernels.weight_sync import SegmentTable, _cuda  # noqa: E402
from polymath_fast.kernels.weight_sync.table import DTYPES, Group  # noqa: E402

SOURCE = ROOT / "csrc" / "weight_sync.cu"
TABLE = Path(__file__).with_name("resources.json")
CHUNK = "16 * kVector * kThreads"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("csrc"))


def compile_library(folder: Path) -> Path:
    """As setup.py does it."""
    library = folder / "libweight_sync.so"
    command = load_setup().command(shutil.which("nvcc"), SOURCE, library)
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("polymath_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc_release() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", text).group(1)


def report(library: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Kernel ("fp32 to bf16") -> architecture -> registers, stack and local bytes."""
    names = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16"}
    text = aot.usage_report(library)
    found: dict[str, dict[str, dict[str, int]]] = {}
    kernel = re.compile(
        r"weight_sync_kernelI(f|13__nv_bfloat16|6__half)(f|S1_|S\w*_|13__nv_bfloat16|6__half)E.*\n"
    )
    for part in re.split(r"\narch = ", text)[1:]:
        arch = part.split("\n", 1)[0].strip()
        for match in kernel.finditer(part):
            src, dst = match.groups()
            # the mangled name repeats a type by a back reference
            pair = f"{names[src]} to {names[dst] if dst in names else names[src]}"
            found.setdefault(pair, {})[arch] = aot.usage(part[match.end() :])
    return found


@needs_nvcc
def test_resources_are_what_the_table_says(compiled: Path) -> None:
    found = report(compiled)
    assert len(found) == len(DTYPES) ** 2
    for by_arch in found.values():
        assert sorted(by_arch) == ["sm_100", "sm_80", "sm_90"]
        for row in by_arch.values():
            assert row["stack"] == row["local"] == 0
            assert row["registers"] * 384 * 2 <= 65536
    expected = json.loads(TABLE.read_text())
    if expected["nvcc"] == nvcc_release():
        assert found == expected["kernels"]


@needs_nvcc
def test_library_and_python_agree_on_the_layout(compiled: Path) -> None:
    chunk, *rest = _cuda.layout(ctypes.CDLL(str(compiled)))
    assert rest == _cuda.expected_layout() == [56, 0, 8, 16, 24, 32, 40, 48]
    assert chunk > 0 and chunk % 8 == 0


@needs_nvcc
def test_a_library_of_another_version_is_refused(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda.dispatch, "library_path", lambda op: compiled)
    monkeypatch.setattr(_cuda, "expected_layout", lambda: [64])
    _cuda.library.cache_clear()
    with pytest.raises(RuntimeError, match="another version; build it again"):
        _cuda.library()


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens where there is no GPU")
def test_without_a_gpu_a_call_is_an_error_code(compiled: Path) -> None:
    lib = ctypes.CDLL(str(compiled))
    lib.polymath_error_string.restype = ctypes.c_char_p
    code = lib.polymath_weight_sync(None, 1, ctypes.c_int64(1), 0, 1, None)
    assert code != 0 and lib.polymath_error_string(code)
    assert lib.polymath_weight_sync(None, 0, ctypes.c_int64(0), 0, 1, None) == 0


@pytest.fixture(scope="module", params=[1024, None], ids=["chunks of 1024", "chunks as compiled"])
def emulated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ctypes.CDLL, int]:
    """The device code compiled for this processor, and the elements of its chunks."""
    folder = tmp_path_factory.mktemp("emulation")
    text = SOURCE.read_text().split('extern "C"')[0]
    assert text.count(CHUNK) == 1
    chunk = request.param or 16 * 8 * 384
    (folder / "device.inc").write_text(text.replace(CHUNK, str(chunk)))
    dryrun = subprocess.run(["nvcc", "--dryrun", "-c", SOURCE], capture_output=True, text=True)
    include = re.search(r'INCLUDES="-I([^"]+)"', dryrun.stderr).group(1).strip()
    library = folder / "emulation.so"
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", f"-I{include}"]
    command += [f'-DSOURCE="{folder / "device.inc"}"', "-o", library]
    subprocess.run([*command, Path(__file__).with_name("emulation.cpp")], check=True)
    lib = ctypes.CDLL(str(library))
    lib.emulate.restype = ctypes.c_int64
    return lib, chunk


@needs_nvcc
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize(("src", "dst"), PAIRS, ids=str)
def test_device_code_copies_as_torch_does(
    emulated: tuple[ctypes.CDLL, int], src: torch.dtype, dst: torch.dtype
) -> None:
    lib, chunk = emulated
    accesses = []

    def run(table: SegmentTable) -> None:
        accesses.extend(emulate(lib, chunk, group) for group in table.groups)

    table = check(run, layouts(src, dst))
    # All but the rows of odd width, the pair off by different amounts, heads and tails is wide.
    assert sum(accesses) >= 0.9 * table.bytes / 16


def emulate(lib: ctypes.CDLL, chunk: int, group: Group) -> int:
    rows, chunks = group.rows(chunk)
    dtypes = map(DTYPES.index, group.segments[0].dtypes)
    return lib.emulate(
        ctypes.c_void_p(rows.ctypes.data), len(rows), ctypes.c_int64(chunks), *dtypes, 3
    )


def write_table() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        table = {"nvcc": nvcc_release(), "kernels": report(compile_library(Path(folder)))}
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(write_table())
