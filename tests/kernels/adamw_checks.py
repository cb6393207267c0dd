"""What every implementation of flat AdamW must fulfil: truth is torch.optim.AdamW in float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polymath_fast.kernels.flat_adamw import Segments, _coefficients, halves

DECAYED, PLAIN = [(3, 1300), (1307, 2900)], [(1300, 1307), (2901, 4500)]
"""segments with a neighbour of the other kind, and gaps at 0:3, 2900:2901 and the end"""
SIZE = 4507


@dataclass
class Settings:
    """Of one run."""

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = torch.inf
    grad_scale: float = 1.0
    zero_grad: bool = True
    segments: Segments = field(
        default_factory=lambda: Segments.of(
            [(*span, True) for span in DECAYED] + [(*span, False) for span in PLAIN]
        )
    )


def start(live: torch.dtype = torch.bfloat16, remainder: bool = False, device: str = "cpu") -> dict:
    """Weights and state before the first update; the master has more digits than `live`."""
    master = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    upper, lower = halves.split(master)
    tensors = {
        "live": upper if live == torch.bfloat16 else master.to(live),
        "master": lower if remainder else master,
        "exp_avg": torch.zeros(SIZE),
        "exp_avg_sq": torch.zeros(SIZE),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def gradients(count: int, size: float = 1.0) -> list[Tensor]:
    """Of as many steps, with elements of many sizes."""
    generator = torch.Generator().manual_seed(7)
    powers = 10 ** (-3 * torch.rand(SIZE, generator=generator))
    return [size * powers * torch.randn(SIZE, generator=generator) for _ in range(count)]


def update(name: str, state: dict, grad: Tensor, step: int, settings: Settings) -> Tensor:
    """One step by implementation `name` ("_cpu", "_triton", "reference"); returns the norm."""
    module = importlib.import_module(f"polymath_fast.kernels.flat_adamw.{name}")
    norm = module.root(module.squares(grad, 0, len(grad)))
    found = _coefficients(
        norm,
        torch.tensor(step, device=grad.device),
        settings.learning_rate,
        settings.betas,
        settings.weight_decay,
        settings.max_grad_norm,
        settings.grad_scale,
    )
    rest = (*settings.betas, settings.eps, settings.zero_grad)
    module.flat_adamw(*state.values(), grad, settings.segments, found, *rest)
    return norm


def run(name: str, state: dict, grads: list[Tensor], settings: Settings) -> dict:
    """All steps; gradients are given as they are, times the scale."""
    for step, grad in enumerate(grads):
        scaled = (grad * settings.grad_scale).to(state["live"].device)
        update(name, state, scaled, step, settings)
        assert not settings.zero_grad or not any(
            scaled[first:last].any() for first, last, _ in settings.segments.rows
        )
    return state


def truth(grads: list[Tensor], settings: Settings) -> dict[str, Tensor]:
    """master, exp_avg and exp_avg_sq of the elements in segments by torch, in float64."""
    weights = start()["master"].double()
    groups, order = [], []
    for first, last, decayed in settings.segments.rows:
        leaf = weights[first:last].clone().requires_grad_()
        decay = settings.weight_decay if decayed else 0.0
        groups.append({"params": [leaf], "weight_decay": decay})
        order.append((slice(first, last), leaf))
    rate, betas, eps = settings.learning_rate, settings.betas, settings.eps
    rival = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, foreach=False)
    for grad in grads:
        size = float(grad.double().norm())
        factor = min(1.0, settings.max_grad_norm / size) if size else 1.0
        for span, leaf in order:
            leaf.grad = grad[span].double() * factor
        rival.step()
    found = {name: torch.zeros(SIZE).double() for name in ("exp_avg", "exp_avg_sq")}
    for span, leaf in order:
        weights[span] = leaf.detach()
        for name, values in found.items():
            values[span] = rival.state[leaf][name]
    return {"master": weights, **found}


def compare(name: str, settings: Settings, grads: list[Tensor], device: str = "cpu") -> None:
    """An implementation with fp32 state against float64, and its remainder against its master."""
    ours = run(name, start(device=device), grads, settings)
    exact = truth(grads, settings)
    # an update rounds the master once, and moments carry a few roundings each
    steps = len(grads) * settings.learning_rate
    bounds = {"master": (2e-7 * len(grads) ** 0.5, 1e-6 * steps), "exp_avg": (1e-5, 1e-6)}
    for key, value in exact.items():
        relative, absolute = bounds.get(key, (1e-5, 1e-12))
        absolute *= float(value.abs().max()) if key == "exp_avg" else 1
        found = ours[key].cpu().double()
        torch.testing.assert_close(found, value, rtol=relative, atol=absolute, msg=_named(key))
    other = run(name, start(remainder=True, device=device), grads, settings)
    assert torch.equal(halves.join(other["live"], other["master"]), ours["master"])
    for key in ("live", "exp_avg", "exp_avg_sq"):
        assert torch.equal(other[key], ours[key]), key
    rounding = (ours["live"].cpu().double() - ours["master"].cpu().double()).abs()
    assert (rounding <= 2.0**-8 * ours["master"].cpu().double().abs()).all()


def _named(key: str) -> Callable[[str], str]:
    return lambda text: f"{key}: {text}"
