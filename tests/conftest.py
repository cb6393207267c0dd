"""Fixtures shared by all tests. Nothing here needs a network or a GPU."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from polymath_fast import environment

os.environ.setdefault("HF_HUB_OFFLINE", "1")
environment.prepare()  # as every command does, before torch is loaded


def pytest_configure() -> None:
    """Hear signals that a parent (nohup, a script's `&`) left ignored; children inherit that."""
    for number, handler in [
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ]:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped without a device; vLLM tests never are under CI."""
    from importlib.util import find_spec

    import torch

    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_vllm = pytest.mark.skip(reason="vLLM is not installed (under CI this is a failure)")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if (
            item.get_closest_marker("vllm")
            and find_spec("vllm") is None
            and not os.environ.get("CI")
        ):
            item.add_marker(no_vllm)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Every test draws the same numbers in every run: one that fails now and then is no test."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CPU worker takes torch.set_num_threads from its process; later tests call it."""
    import torch

    monkeypatch.setattr(torch, "set_num_threads", torch._C.set_num_threads)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A random two-layer Llama with grouped-query attention and a byte tokenizer."""
    from polymath_fast.models import resolve_model

    return resolve_model("random:tiny", notify=lambda text: None)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded 135M model as a Hugging Face folder."""
    from polymath_fast.models import resolve_model

    return resolve_model("embedded:smollm2", notify=lambda text: None)
