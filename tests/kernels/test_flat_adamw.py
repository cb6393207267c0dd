"""Flat AdamW against torch.optim.AdamW in float64, and what must not change a single bit."""

from __future__ import annotations

import math

import pytest
import torch
from adamw_checks import SIZE, Settings, compare, gradients, run, start, truth, update

from polymath_fast.kernels import flat_adamw, grad_norm
from polymath_fast.kernels.cpu import adamw
from polymath_fast.kernels.flat_adamw import PART, Segments, _cpu, halves

IMPLEMENTATIONS = pytest.mark.parametrize("name", ["_cpu", "reference"])
SETTINGS = {
    "plain": Settings(),
    "clipped": Settings(max_grad_norm=0.5, weight_decay=0.0),
    "unscaled": Settings(max_grad_norm=0.5, grad_scale=1024.0),
    "no momentum": Settings(betas=(0.0, 0.0)),
    "large eps": Settings(eps=10.0, learning_rate=1.0),
    "small eps": Settings(eps=1e-30),
    "gradient kept": Settings(zero_grad=False),
}


@IMPLEMENTATIONS
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_twenty_steps_equal_float64(name: str, settings: Settings) -> None:
    compare(name, settings, gradients(20))


@IMPLEMENTATIONS
def test_the_first_step_moves_by_the_learning_rate(name: str) -> None:
    """Bias correction: m / sqrt(v) is the sign of the gradient, whatever its size."""
    settings = Settings(weight_decay=0.0, eps=1e-30)
    before = start()["master"]
    for size in (1e-6, 1.0, 1e6):
        grad = gradients(1, size)[0]
        after = run(name, start(), [grad], settings)["master"]
        moved = (after - before)[3:1300]
        torch.testing.assert_close(moved, -1e-3 * grad[3:1300].sign(), rtol=1e-3, atol=3e-7)


@IMPLEMENTATIONS
def test_a_learning_rate_of_zero_gathers_moments_and_moves_nothing(name: str) -> None:
    settings = Settings(learning_rate=0.0)
    state = run(name, start(), gradients(3), settings)
    assert torch.equal(state["master"], start()["master"])
    assert torch.equal(state["live"], start()["live"])
    torch.testing.assert_close(
        state["exp_avg"].double(), truth(gradients(3), settings)["exp_avg"], rtol=1e-5, atol=1e-7
    )


@IMPLEMENTATIONS
def test_denormal_moments_are_kept(name: str) -> None:
    settings = Settings(weight_decay=0.0, eps=1e-20)
    grads = gradients(5, 1e-20)  # squares of 1e-40
    state, exact = run(name, start(), grads, settings), truth(grads, settings)
    assert 0 < state["exp_avg_sq"].max() < 1.2e-38
    torch.testing.assert_close(
        state["exp_avg_sq"].double(), exact["exp_avg_sq"], rtol=1e-2, atol=1e-44
    )
    torch.testing.assert_close(state["master"].double(), exact["master"], rtol=0, atol=1e-4)


@IMPLEMENTATIONS
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("remainder", [False, True])
def test_a_gradient_that_is_not_finite_changes_no_byte(name, poison, remainder) -> None:
    state = run(name, start(remainder=remainder), gradients(2), Settings())
    before = {key: tensor.clone() for key, tensor in state.items()}
    grad = gradients(1)[0]
    grad[4000] = poison
    norm = update(name, state, grad, 2, Settings())
    assert not norm.isfinite()
    for key, tensor in state.items():
        assert torch.equal(tensor, before[key]), key
    assert not grad[3:2900].any() and not grad[2901:4500].any()


@IMPLEMENTATIONS
def test_large_finite_gradients_are_clipped_not_dropped(name: str) -> None:
    grad = gradients(1, 1e37)[0]
    state = start()
    norm = update(name, state, grad.clone(), 0, Settings(max_grad_norm=1.0))
    assert norm.item() == pytest.approx(float(grad.double().norm()), rel=1e-12)
    torch.testing.assert_close(
        state["exp_avg"][3:1300].double(), 0.1 * (grad.double() / norm)[3:1300], rtol=1e-3, atol=0
    )


@IMPLEMENTATIONS
def test_elements_outside_segments_keep_every_byte(name: str) -> None:
    outside = torch.ones(SIZE, dtype=torch.bool)
    for first, last, _ in Settings().segments.rows:
        outside[first:last] = False
    state, grads = start(), gradients(3)
    run(name, state, grads, Settings())
    for key, tensor in start().items():
        assert torch.equal(state[key][outside], tensor[outside]), key
    grad = gradients(1)[0]
    update(name, state, grad, 3, Settings())
    assert torch.equal(grad[outside], gradients(1)[0][outside])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@IMPLEMENTATIONS
def test_other_live_dtypes_are_roundings_of_the_same_master(name, dtype) -> None:
    ours = run(name, start(dtype), gradients(4), Settings())
    assert torch.equal(ours["master"], run(name, start(), gradients(4), Settings())["master"])
    inside = slice(3, 2900)
    assert torch.equal(ours["live"][inside], ours["master"][inside].to(dtype))


@IMPLEMENTATIONS
def test_float32_weights_may_be_the_master_themselves(name: str) -> None:
    apart, one = start(torch.float32), start(torch.float32)
    one["live"] = one["master"]
    for state in (apart, one):
        run(name, state, gradients(4), Settings())
    for key in ("master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(apart[key], one[key]), key


def test_any_split_and_any_number_of_threads_give_the_same_bits(monkeypatch) -> None:
    whole, parts = start(), start()
    before = torch.get_num_threads()
    for step, grad in enumerate(gradients(3)):
        norm = update("_cpu", whole, grad.clone(), step, Settings())
        try:
            torch.set_num_threads(3)
            monkeypatch.setattr(_cpu, "_QUANTUM", 100)
            assert grad_norm(grad) == norm
            for first in range(0, SIZE, 701):
                last = min(first + 701, SIZE)
                flat_adamw(
                    *(tensor[first:last] for tensor in parts.values()),
                    grad[first:last],
                    norm=norm,
                    step=torch.tensor(step),
                    learning_rate=1e-3,
                    segments=Settings().segments.part(first, last),
                    beta2=0.98,
                    weight_decay=0.1,
                )
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_the_norm_over_several_chunks(impl: str) -> None:
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(2 * adamw.CHUNK + 77, generator=generator)
    norm = grad_norm(grad, impl=impl)
    assert norm.dtype == torch.float64 and norm.shape == ()
    assert norm.item() == pytest.approx(math.sqrt(math.fsum((grad.double() ** 2).tolist())))
    grad[-1] = math.nan
    assert grad_norm(grad, impl=impl).isnan()
    assert grad_norm(torch.empty(0), impl=impl) == 0


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_the_norm_of_parts_that_are_added_up(impl: str) -> None:
    """The same bits as of the whole in compiled code; one part may be empty."""
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(3 * PART + 77, generator=generator)
    parts = [(0, PART), (PART, PART), (PART, len(grad))]
    seen: list[torch.Tensor] = []
    for part in parts:
        grad_norm(grad, part=part, add=lambda sums: seen.append(sums.clone()), impl=impl)
    found = grad_norm(grad, part=(0, 0), add=lambda sums: sums.add_(sum(seen)), impl=impl)
    whole = grad_norm(grad, impl=impl)
    assert found == whole if impl == "cpu" else found.item() == pytest.approx(whole.item())
    for part in ((1, PART), (0, 7), (PART, 0), (0, 4 * PART)):
        with pytest.raises(ValueError, match=f"part is {part[0]}:{part[1]} of"):
            grad_norm(grad, part=part, impl=impl)


def test_halves_hold_every_number() -> None:
    """All lower halves beside bits of both parities and signs, infinities and a NaN."""
    lower = torch.arange(2**16, dtype=torch.int32)
    for upper in (0x0000, 0x3F80, 0x3F81, 0xBF80 - 2**16, 0x7F7F, 0x0001, 0x8001 - 2**16):
        value = ((torch.tensor(upper, dtype=torch.int32) << 16) + lower).view(torch.float32)
        live, rest = halves.split(value)
        assert torch.equal(halves.join(live, rest).view(torch.int32), value.view(torch.int32))
        assert torch.equal(halves.rounded(value, torch.bfloat16), live)
        even = value.bfloat16()
        assert (live.view(torch.int16) != even.view(torch.int16)).sum() <= 1  # the tie
        if value.isfinite().all() and live.isfinite().all():
            error = (live.double() - value.double()).abs()
            assert (error <= (even.double() - value.double()).abs()).all()
    special = torch.tensor([math.inf, -math.inf, math.nan])
    live, rest = halves.split(special)
    assert torch.equal(halves.join(live, rest).view(torch.int32), special.view(torch.int32))


def test_ties_are_rounded_alike_with_and_without_a_remainder() -> None:
    """Half of all bf16 ties go another way than torch's rounding to even."""
    upper = torch.arange(-(2**15), 2**15, 3, dtype=torch.int32) << 16
    values = (upper + 0x8000).view(torch.float32)
    values = values[values.isfinite()]
    settings = {"norm": torch.tensor(0.0).double(), "step": torch.tensor(0), "learning_rate": 0.0}
    found = []
    for impl in ("cpu", "reference"):
        for remainder in (False, True):
            live, lower = halves.split(values)
            live = live if remainder else torch.zeros_like(live)
            zeros = [torch.zeros_like(values) for _ in range(3)]
            flat_adamw(live, lower if remainder else values.clone(), *zeros, **settings, impl=impl)
            found.append(live)
    expected = halves.split(values)[0]
    assert all(torch.equal(live, expected) for live in found)
    assert not torch.equal(expected, values.bfloat16())


def test_segments() -> None:
    rows = [(8, 10, True), (0, 4, True), (4, 8, True), (10, 12, False), (14, 15, False)]
    segments = Segments.of(rows)
    assert segments.rows == ((0, 10, True), (10, 12, False), (14, 15, False))
    assert segments.table.tolist() == [[0, 10, 14], [10, 12, 15], [1, 0, 0]]
    assert segments.part(9, 15).rows == ((0, 1, True), (1, 3, False), (5, 6, False))
    assert segments.part(12, 14).rows == () and segments.part(12, 14).table.shape == (3, 0)
    for wrong in ([(0, 4, True), (3, 5, True)], [(2, 2, True)], [(-1, 2, True)]):
        with pytest.raises(ValueError, match="segment"):
            Segments.of(wrong)


def test_nothing_at_all() -> None:
    state = [torch.empty(0)] * 5
    norm, step = torch.tensor(0.0).double(), torch.tensor(0)
    for impl in ("cpu", "reference"):
        flat_adamw(*state, norm=norm, step=step, learning_rate=1e-3, impl=impl)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"live": torch.zeros(8, dtype=torch.int8)}, "live is"),
        ({"live": torch.zeros(7)}, "live has 7 elements"),
        ({"live": torch.zeros(16)[::2]}, "contiguous"),
        ({"live": torch.zeros(2, 4)}, "live is"),
        ({"master": torch.zeros(8, dtype=torch.float64)}, "master is"),
        ({"master": torch.zeros(8, dtype=torch.int16)}, "a remainder, beside live torch.float32"),
        ({"grad": torch.zeros(8).bfloat16()}, "grad is"),
        ({"norm": torch.tensor(1.0)}, "norm is"),
        ({"step": torch.tensor(1.0)}, "step is"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"beta2": -0.1}, "beta2=-0.1"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": 1e-40}, "eps=1e-40"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"grad_scale": 0.0}, "grad_scale=0"),
        ({"segments": Segments.of([(0, 9, True)])}, "segments end at 9"),
        ({"impl": "triton"}, "impl='triton'"),
    ],
)
def test_bad_input_is_refused(changes: dict, message: str) -> None:
    names = ("live", "master", "exp_avg", "exp_avg_sq", "grad")
    given = {name: torch.zeros(8) for name in names} | {"learning_rate": 1e-3}
    given |= {"norm": torch.tensor(1.0).double(), "step": torch.tensor(0)} | changes
    with pytest.raises(ValueError, match=message):
        flat_adamw(**given)
    with pytest.raises(ValueError, match="grad is"):
        grad_norm(torch.zeros(4, 4))
