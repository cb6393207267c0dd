"""Tensors that travel in one piece arrive as they were."""

from __future__ import annotations

import pytest
import torch

from polymath_fast.kernels import transfer


def tensors() -> list[torch.Tensor]:
    return [
        torch.arange(7, dtype=torch.int64).view(1, 7),
        torch.tensor([], dtype=torch.int32),
        torch.randn(3),
        torch.arange(5, dtype=torch.int32),
        torch.randn(2, 3, dtype=torch.float64),
        torch.tensor([True, False, True]),
    ]


def test_on_a_cpu_nothing_is_copied() -> None:
    given = tensors()
    assert all(a is b for a, b in zip(transfer.send(given, "cpu"), given, strict=True))


def test_one_copy_arrives_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is "meta" but for its copy, which is taken at the door."""
    copies = []

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        assert device.type == "meta" and non_blocking
        copies.append(tensor.clone())
        return copies[-1]

    monkeypatch.setattr(torch.Tensor, "to", to)
    given = tensors()
    found = transfer.send(given, "meta")
    assert len(copies) == 1
    for sent, kept in zip(found, given, strict=True):
        assert sent.dtype == kept.dtype and torch.equal(sent, kept)
        assert (sent.data_ptr() - copies[0].data_ptr()) % 16 == 0 or not sent.numel()


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    given = tensors()
    for sent, kept in zip(transfer.send(given, "cuda"), given, strict=True):
        assert sent.is_cuda and sent.dtype == kept.dtype and torch.equal(sent.cpu(), kept)
