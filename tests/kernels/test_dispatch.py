"""Which implementation runs, and why: rules that need no GPU to be tested."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polymath_fast import kernels
from polymath_fast.kernels import dispatch, token_logprobs
from polymath_fast.kernels.prefix_attention import NO_TREES

ROW, TARGET = torch.randn(1, 5), torch.tensor([2])


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    order = {"op": ("triton", "cpu", "reference"), "plain": ("reference",)}
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", order)


@pytest.mark.usefixtures("with_triton")
def test_auto_takes_what_can_run() -> None:
    bf16 = torch.bfloat16
    assert dispatch.choose("op", "cuda", bf16, capability=(9, 0))[0] == "triton"
    assert dispatch.choose("op", "cpu", bf16)[0] == "cpu"
    assert dispatch.choose("op", "cpu", torch.float64)[0] == "reference"
    name, reason = dispatch.choose("op", "cuda", bf16, capability=(7, 5))
    assert name == "reference"
    assert "7.5 is below 8.0" in reason


def test_a_device_may_be_given_by_name() -> None:
    found = dispatch.choose_here("grpo_loss", "cpu", torch.float64)
    assert found == dispatch.choose_here("grpo_loss", torch.device("cpu"), torch.float64)
    assert found[0] == "reference"


def test_a_library_runs_where_it_is_installed() -> None:
    op, hopper = "prefix_attention", (9, 0)

    def choose(dtype: torch.dtype = torch.bfloat16, **options: object) -> tuple[str, str]:
        return dispatch.choose(op, "cuda", dtype, capability=hopper, **options)

    assert choose(flash_attn=True)[0] == "flash"
    name, reason = choose(flash_attn=False)
    assert name == "triton" and "flash-attn is not installed" in reason
    name, reason = choose(torch.float32, flash_attn=True)
    assert name == "triton" and "float32" in reason
    with pytest.raises(ValueError, match="flash-attn is not installed"):
        choose(impl="flash", flash_attn=False)
    name, reason = choose(flash_attn=True, unable=NO_TREES)
    assert name == "triton" and "takes no tree" in reason
    with pytest.raises(ValueError, match="'flash' is not possible here: it takes no tree"):
        choose(impl="flash", flash_attn=True, unable=NO_TREES)
    with pytest.raises(ValueError, match="7.5 is below 8.0"):
        dispatch.choose(op, "cuda", torch.float16, impl="flash", capability=(7, 5))


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (("flash_attn/cute/__init__.py",), "triton"),  # flash-attn-4 alone
        (("flash_attn/__init__.py", "flash_attn/flash_attn_interface.py"), "flash"),
    ],
)
def test_a_library_of_the_same_name_is_another_one(
    files: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    dispatch.has_flash_attn.cache_clear()
    chosen, _ = dispatch.choose("prefix_attention", "cuda", torch.bfloat16, capability=(9, 0))
    dispatch.has_flash_attn.cache_clear()
    assert chosen == name


@pytest.mark.usefixtures("with_triton")
def test_asked_for_but_impossible_says_why() -> None:
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        dispatch.choose("op", "cpu", torch.float32, impl="triton")
    with pytest.raises(ValueError, match="plain has only reference"):
        dispatch.choose("plain", "cpu", torch.float32, impl="cpu")
    with pytest.raises(ValueError, match="impl='cuba'"):
        dispatch.choose("op", "cpu", torch.float32, impl="cuba")
    with pytest.raises(ValueError, match="float64"):
        dispatch.choose("op", "cpu", torch.float64, impl="cpu")


@pytest.mark.usefixtures("with_triton")
def test_a_default_binds_where_it_exists() -> None:
    fp32 = torch.float32
    assert dispatch.choose("op", "cpu", fp32, default="reference")[0] == "reference"
    assert dispatch.choose("op", "cpu", fp32, default="reference", impl="cpu")[0] == "cpu"
    assert dispatch.choose("plain", "cpu", fp32, default="cpu")[0] == "reference"
    with pytest.raises(ValueError, match="on cpu"):
        dispatch.choose("op", "cpu", fp32, default="triton")


def _ran() -> str:
    return dispatch.resolve("token_logprobs", ROW, "auto").__name__.rsplit(".", 1)[1]


def test_use_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _ran() == "_cpu"
    with kernels.use("reference"):
        assert _ran() == "reference"
        with kernels.use("cpu"):
            assert _ran() == "_cpu"
        assert _ran() == "reference"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    assert _ran() == "reference"
    with kernels.use("auto"):
        assert _ran() == "_cpu"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "fastest")
    with pytest.raises(ValueError, match="POLYMATH_FAST_IMPL='fastest'"):
        token_logprobs(ROW, TARGET)
    with pytest.raises(ValueError, match="kernels.use"), kernels.use("best"):
        pass


def test_slow_fallback_on_a_gpu_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        device, dtype = torch.device("cuda"), torch.float64

    dispatch._warn_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "token_logprobs", ("triton", "reference"))
    with pytest.warns(UserWarning, match="token_logprobs runs its slow reference"):
        dispatch.resolve("token_logprobs", OnCuda(), "auto")
    dispatch.resolve("token_logprobs", OnCuda(), "auto")  # a second warning would be an error
    dispatch._warn_once.cache_clear()


def test_names_mean_operators_whatever_is_imported_first() -> None:
    code = (
        "import sys, polymath_fast.kernels as k\n"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules\n"
        "import polymath_fast.kernels.grpo_loss.reference\n"
        "from polymath_fast.kernels import grpo_loss, PolicyLossSpec\n"
        "assert callable(grpo_loss) and callable(k.grpo_loss) and 'use' in dir(k)\n"
        "try: k.nothing\n"
        "except AttributeError: print('ok')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "ok\n", run.stderr


@pytest.mark.parametrize("op", sorted(dispatch.IMPLEMENTATIONS))
def test_docstrings_name_the_implementations_that_exist(op: str) -> None:
    folder = importlib.import_module(f"polymath_fast.kernels.{op}")
    text = inspect.getdoc(getattr(folder, op, folder))
    said = re.search(r"impl: (.+?)\.\s", text, re.DOTALL)[1]
    named = set(re.findall(r'"(\w+)"', said))
    assert named == {"auto", *dispatch.IMPLEMENTATIONS[op]}
