"""patch_trl(): TRL's functions and trainers give the same numbers on our kernels, and back."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("trl")

import trl.trainer.utils as trl_utils  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_runs import assert_same_run, rollouts, train  # noqa: E402

from polymath_fast.errors import UserError  # noqa: E402
from polymath_fast.integrations.trl import patch_trl  # noqa: E402

NAMES = (
    "selective_log_softmax",
    "entropy_from_logits",
    "selective_log_softmax_and_entropy",
    "_ChunkedLogProbFunction",
)


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits (2, 5, 33), index (2, 5), row_mask (2, 5)"""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2, 5, 33, generator=generator)
    index = torch.randint(33, (2, 5), generator=generator)
    return logits.requires_grad_(), index, (index % 3 != 0).long()


def _values(logits: torch.Tensor, index: torch.Tensor, row_mask: torch.Tensor) -> list:
    both = trl_utils.selective_log_softmax_and_entropy(
        logits, index, temperature=0.7, row_mask=row_mask
    )
    single = trl_utils.selective_log_softmax(logits, index, 0.7, row_mask)
    results = [*both, single, trl_utils.entropy_from_logits(logits)]
    weights = torch.arange(10.0).view(2, 5)
    (gradient,) = torch.autograd.grad(sum((weights * r).sum() for r in results), logits)
    return [*results, gradient]


def test_functions_agree_and_come_back(tokens) -> None:
    before = {name: getattr(trl_utils, name) for name in NAMES}
    theirs = _values(*tokens)
    with patch_trl():
        assert all(getattr(trl_utils, name) is not before[name] for name in NAMES)
        ours = _values(*tokens)
    assert {name: getattr(trl_utils, name) for name in NAMES} == before
    for mine, expected in zip(ours, theirs, strict=True):
        assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_names_imported_by_other_modules_are_replaced_too() -> None:
    from trl.experimental.cpo import cpo_trainer

    original = cpo_trainer.selective_log_softmax
    handle = patch_trl()
    assert cpo_trainer.selective_log_softmax is trl_utils.selective_log_softmax is not original
    handle.undo()
    handle.undo()
    assert cpo_trainer.selective_log_softmax is trl_utils.selective_log_softmax is original


def test_rows_that_are_masked_may_hold_any_index(tokens) -> None:
    logits, index, _ = tokens
    index = index.clone()
    index[0, 0] = -100
    row_mask = torch.ones_like(index)
    row_mask[0, 0] = 0
    with patch_trl():
        logprobs = trl_utils.selective_log_softmax(logits, index, row_mask=row_mask)
    assert logprobs[0, 0] == 0
    assert (logprobs[0, 1:] < 0).all()


def test_calls_that_are_not_covered_stay_with_trl(tokens) -> None:
    logits, index, _ = tokens
    several = torch.stack([index, index.flip(0)], -1)
    expected = trl_utils.selective_log_softmax(logits, several)
    hidden, weight = torch.randn(4, 8), torch.randn(33, 8)
    head = (hidden, weight, None, index[0, :4], 1.0, 16, 5.0, 1.0, ("log_probs", "is_top1"))
    expected_head = trl_utils._ChunkedLogProbFunction.apply(*head)
    with patch_trl(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_close(trl_utils.selective_log_softmax(logits, several), expected)
        found_head = trl_utils._ChunkedLogProbFunction.apply(*head)
    assert_close(found_head[0], expected_head[0])
    assert_close(found_head[4], expected_head[4])
    said = " ".join(str(warning.message) for warning in caught)
    assert "several indices a row" in said
    assert "softcapped logits" in said


def test_a_trainer_on_our_kernels(tiny_model: Path, tmp_path: Path) -> None:
    options = {"beta": 0.1, "entropy_coef": 0.05, "temperature": 0.8}
    theirs = train(GRPOTrainer, tiny_model, tmp_path, rollout_func=rollouts(320, 2), **options)
    with patch_trl():
        ours = train(GRPOTrainer, tiny_model, tmp_path, rollout_func=rollouts(320, 2), **options)
    assert_same_run(ours, theirs)


def test_patching_twice_is_refused() -> None:
    with patch_trl(), pytest.raises(UserError, match="is replaced already"):
        patch_trl()


def test_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_utils, "entropy_from_logits", lambda logits: logits)
    with pytest.raises(UserError, match=r"entropy_from_logits takes \['logits'\]"):
        patch_trl()
