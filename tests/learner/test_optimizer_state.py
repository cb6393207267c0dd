"""Forms of the optimizer's state: none changes a result, and each continues another's run."""

from __future__ import annotations

import pytest
import torch
from small_models import SETTINGS, Model, batches

from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.kernels.flat_adamw import halves
from polymath_fast.learner import optimizer_state
from polymath_fast.learner.flat_storage import FlatStorage
from polymath_fast.learner.offload import Offloaded
from polymath_fast.learner.optimizer import FlatAdamW
from polymath_fast.learner.state_file import StateFile

BF16 = torch.bfloat16
FORMS = {"float32": {}, "remainder": {"master_weights": "remainder"}}
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def make(form: dict, storage: FlatStorage | None = None, device: str = "cpu"):
    model = Model(BF16).to(device)
    return model, FlatAdamW(model, Config(**SETTINGS, **form), storage)


def train(made, data) -> None:
    model, optimizer = made
    for x in data:
        model(x.to(optimizer.live)).backward()
        norm, updated = optimizer.step(1e-3)
        assert updated and norm.dtype == torch.float64


def assert_same(ours, theirs) -> None:
    for name, tensor in ours[1].tensors().items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        assert torch.equal(tensor.cpu(), theirs[1].tensors()[name].cpu()), name
    for (name, mine), other in zip(ours[0].named_parameters(), theirs[0].parameters(), strict=True):
        assert torch.equal(mine.cpu(), other.cpu()), name
    assert ours[1].updates == theirs[1].updates


@DEVICES
@pytest.mark.parametrize("scattered", [False, True], ids=["own storage", "foreign storage"])
def test_a_remainder_trains_as_a_float32_master_bit_for_bit(scattered: bool, device: str) -> None:
    places = {"inner": (3, (6, 6)), "scale": (40, (6,)), "table": (46, (11, 6))}
    made = []
    for form in FORMS.values():
        room = torch.zeros(120, dtype=BF16, device=device)
        made.append(make(form, FlatStorage(room, places) if scattered else None, device))
        train(made[-1], batches(12))
    assert_same(*made)


@pytest.mark.parametrize("before", FORMS)
@pytest.mark.parametrize("after", FORMS)
def test_any_form_resumes_in_any_form_exactly(before: str, after: str) -> None:
    straight, first, second = make({}), make(FORMS[before]), make(FORMS[after])
    train(straight, batches(10))
    train(first, batches(10)[:5])
    saved = {name: tensor.clone() for name, tensor in first[1].tensors().items()}
    second[1].load(saved, first[1].updates)
    train(second, batches(10)[5:])
    assert_same(straight, second)


def test_any_float32_number_survives_in_a_remainder() -> None:
    """A checkpoint may hold ties between two bfloat16 numbers, on both sides of an even one."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F817FFF, 0x3F800000, 0x00008001, 0x7F7FFFFF])
    master = bits.to(torch.int32).view(torch.float32).repeat(18)
    found = []
    for form in FORMS.values():
        _, optimizer = make(form)
        rest = {name: torch.zeros(108) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.load({"master": master, **rest}, 3)
        assert torch.equal(optimizer.tensors()["master"], master)
        found.append(optimizer.live)
    assert torch.equal(*found) and torch.equal(found[0], halves.split(master)[0])


def test_tensors_in_pieces(monkeypatch) -> None:
    whole, pieces = make(FORMS["remainder"]), make(FORMS["remainder"])
    train(whole, batches(3))
    train(pieces, batches(3))
    monkeypatch.setattr(optimizer_state, "_PIECE", 7)
    saved = pieces[1].tensors()
    other = make(FORMS["remainder"])
    other[1].load(saved, 3)
    assert_same(whole, other)


class Streamed(Offloaded):
    """The way of a GPU's state, for that of a CPU."""

    def __init__(self, folder, kinds, elements: int):
        self.tensors = {name: torch.zeros(elements, dtype=kind) for name, kind in kinds.items()}
        super().__init__(self.tensors, torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "way"),
    [
        ("cpu", StateFile),
        ("cpu", Streamed),
        pytest.param("cuda", Offloaded, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("chunk", [7, 32, 1000])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_offloaded_state_changes_nothing(form, chunk, device, way, monkeypatch) -> None:
    for kind in (Offloaded, StateFile):
        monkeypatch.setattr(kind.__init__, "__defaults__", (chunk,))
    if device == "cpu":
        monkeypatch.setattr(optimizer_state, "StateFile", way)
    plain = make(form, device=device)
    away = make(form | {"offload_optimizer": True}, device=device)
    for made in (plain, away):
        train(made, batches(4))
        saved = {name: tensor.clone() for name, tensor in made[1].tensors().items()}
        made[1].load(saved, 4)
        train(made, batches(6)[4:])
    assert type(away[1].state._away) is way
    assert_same(plain, away)
    assert all(tensor.device.type == "cpu" for tensor in away[1].tensors().values())


@DEVICES
def test_every_chunk_is_visited_once_and_comes_back(device: str) -> None:
    numbers = torch.arange(1003.0)
    numbers = numbers.pin_memory() if device == "cuda" else numbers
    away = Offloaded({"a": numbers, "b": -numbers}, torch.device(device), chunk=100)
    spans = []

    def visit(start: int, stop: int, here: dict[str, torch.Tensor]) -> None:
        spans.append((start, stop))
        assert here["a"].device.type == device and here["a"].shape == (stop - start,)
        here["a"] += 1
        here["b"] += here["a"]

    for _ in range(3):
        away.sweep(visit)
    away.settle()
    assert spans == 3 * [(s, min(s + 100, 1003)) for s in range(0, 1003, 100)]
    assert torch.equal(numbers, torch.arange(1003.0) + 3)


def test_a_remainder_of_float32_weights_is_refused() -> None:
    with pytest.raises(UserError, match=r"remainder completes bfloat16 .* torch.float32"):
        FlatAdamW(Model(torch.float32), Config(master_weights="remainder"))


def test_parameters_that_no_pass_reached_have_no_gradient() -> None:
    """The first pass writes over the last step's gradient instead of adding to zeros."""
    model, optimizer = make({})
    train((model, optimizer), batches(2))
    model.table.sum().backward()
    table = next(
        slice(*span) for name, span in optimizer.storage.spans().items() if name == "table"
    )
    expected = torch.zeros_like(optimizer.grad)
    expected[table] = 1
    assert torch.equal(optimizer.grad, expected)
    model.table.sum().backward()
    assert torch.equal(optimizer.grad, 2 * expected)
    optimizer.zero_grad()
    assert not optimizer.grad.any()


@pytest.mark.parametrize("scattered", [False, True], ids=["own storage", "foreign storage"])
def test_float32_weights_are_their_own_master(scattered: bool) -> None:
    """Trained as torch's AdamW trains them in float64; saved, and continued from what was saved."""
    places = {"inner": (3, (6, 6)), "scale": (40, (6,)), "table": (46, (11, 6))}
    storage = FlatStorage(torch.zeros(120), places) if scattered else None
    model, wide = Model(torch.float32), Model(torch.float64)
    optimizer = FlatAdamW(model, Config(**SETTINGS), storage)
    decay = SETTINGS["weight_decay"]
    groups = [
        {"params": [wide.table, wide.inner], "weight_decay": decay},
        {"params": [wide.scale], "weight_decay": 0.0},
    ]
    truth = torch.optim.AdamW(groups, betas=(0.9, SETTINGS["adam_beta2"]))
    for x in batches(6):
        wide(x.double()).backward()
        torch.nn.utils.clip_grad_norm_(wide.parameters(), SETTINGS["max_grad_norm"])
        for group in truth.param_groups:
            group["lr"] = 1e-3
        truth.step()
        truth.zero_grad()
    train((model, optimizer), batches(3))
    saved = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    second = Model(torch.float32)
    resumed = FlatAdamW(second, Config(**SETTINGS))
    resumed.load(saved, optimizer.updates)
    for made in ((model, optimizer), (second, resumed)):
        train(made, batches(6)[3:])
        for ours, exact in zip(made[0].parameters(), wide.parameters(), strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-7)
    assert optimizer.tensors()["master"].numel() == 6 + 66 + 36
    assert_same((model, optimizer), (second, resumed))
