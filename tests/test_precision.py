"""Which dtype weights have, and what refuses the other one."""

from __future__ import annotations

import pytest
import torch

from polymath_fast import precision
from polymath_fast.errors import UserError
from polymath_fast.learner.policy import Policy
from polymath_fast.rollout import vllm_process
from polymath_fast.train import main


def test_auto_is_what_the_processor_multiplies() -> None:
    assert precision.choose_dtype("auto", "cpu", fast_bfloat16=True)[0] == "bfloat16"
    dtype, reason = precision.choose_dtype("auto", "cpu", fast_bfloat16=False)
    assert (dtype, reason) == ("float32", "this processor has no bfloat16 instructions")
    assert precision.choose_dtype("auto", "cuda")[0] == "bfloat16"


def test_what_is_asked_for_is_taken_and_said_to_be_slow() -> None:
    for asked in ("bfloat16", "float32"):
        assert precision.choose_dtype(asked, "cpu", fast_bfloat16=True)[0] == asked
    dtype, reason = precision.choose_dtype("bfloat16", "cpu", fast_bfloat16=False)
    assert dtype == "bfloat16" and "slow" in reason


def test_a_policy_follows_the_processor(tiny_model, monkeypatch) -> None:
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda fast=fast: fast)
        assert Policy(tiny_model).model.dtype == dtype


def test_vllm_refuses_bfloat16_on_a_processor_without_it(monkeypatch) -> None:
    # an operator's packet takes no new attributes, so its holder is replaced
    holder = type("Operators", (), {"_is_mkldnn_bf16_supported": staticmethod(lambda: False)})
    monkeypatch.setattr(torch.ops, "mkldnn", holder)
    with pytest.raises(UserError, match=r"no AVX512; --dtype float32 works"):
        vllm_process.require_dtype("bfloat16", "cpu")
    vllm_process.require_dtype("float32", "cpu")
    vllm_process.require_dtype("bfloat16", "cuda")


def test_a_remainder_of_float32_weights_is_refused_before_anything_is_loaded(capsys) -> None:
    flags = ["--model", "random:tiny", "--dtype", "float32", "--master-weights", "remainder"]
    assert main([*flags, "--device", "cpu", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "remainder" in said and "--dtype bfloat16" in said
