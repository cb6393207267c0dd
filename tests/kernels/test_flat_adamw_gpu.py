"""AdamW in Triton on a GPU: odd addresses, equal bits, and a host that waits for nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adamw_checks import SIZE, Settings, gradients, start, update
from adamw_checks import compare as compare_adamw

from polymath_fast.kernels import flat_adamw, grad_norm
from polymath_fast.kernels.flat_adamw import Segments

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "settings",
    [Settings(), Settings(max_grad_norm=0.5, grad_scale=64.0), Settings(eps=1e-30)],
    ids=["plain", "clipped", "small-eps"],
)
def test_flat_adamw(settings: Settings) -> None:
    settings = replace(settings, segments=Segments.of(settings.segments.rows, "cuda"))
    compare_adamw("_triton", settings, gradients(20), "cuda")


def test_flat_adamw_at_odd_addresses_and_in_two_runs_gives_the_same_bits() -> None:
    """Slices whose pointers are not aligned run another variant of the kernel."""
    settings = Settings(segments=Segments.of([(0, SIZE, True)], "cuda"), max_grad_norm=0.5)
    runs = []
    for shift in (0, 0, 1, 3):
        state = start(remainder=True, device="cuda")
        room = {name: torch.empty(SIZE + shift).to(tensor) for name, tensor in state.items()}
        state = {name: room[name][shift:].copy_(tensor) for name, tensor in state.items()}
        for step, grad in enumerate(gradients(3)):
            norm = update("_triton", state, grad.cuda(), step, settings)
        runs.append([norm, *state.values()])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_flat_adamw_keeps_every_byte_when_the_gradient_is_not_finite() -> None:
    state, settings = start(device="cuda"), Settings()
    settings = replace(settings, segments=Segments.of(settings.segments.rows, "cuda"))
    grad = gradients(1)[0].cuda()
    grad[4000] = torch.inf
    update("_triton", state, grad, 0, settings)
    assert all(torch.equal(tensor.cpu(), start()[name]) for name, tensor in state.items())


def test_flat_adamw_does_not_wait_for_the_host() -> None:
    state = start(device="cuda")
    settings = Settings(segments=Segments.of(Settings().segments.rows, "cuda"))
    grads = [grad.cuda() for grad in gradients(2)]
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    rest = {"step": step, "learning_rate": 1e-3, "segments": settings.segments}
    flat_adamw(*state.values(), grads[0], norm=grad_norm(grads[0]), **rest)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flat_adamw(*state.values(), grads[1], norm=grad_norm(grads[1]), **rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
