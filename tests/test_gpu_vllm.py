"""The GPU suite's sections with vLLM, on a CPU: they run, and tell what is wrong."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks import gpu_pytest, gpu_suite, gpu_vllm, vllm_pair, vllm_pushes
from benchmarks.vllm_pair import Job
from polymath_fast.errors import EngineError
from polymath_fast.models import random_models
from polymath_fast.precision import choose_dtype
from polymath_fast.rollout.types import Completion

SMALL = {"device": "cpu", "completions": 16, "length": 24, "prompt": 20, "repeats": 2}
NAMES = {"start s", "gap before", "gap after", "first token alone ms", "copy TB/s"}
OURS = ["ours: sync", "ours: first token"]
LOADED = ("load_weights one by one", "load_weights at once")
TWICE = ("load_weights in buckets", "reload_weights")
"""of vLLM's own ways those that write the weights somewhere else first"""


@pytest.mark.vllm
@pytest.mark.parametrize("strategy", ["alias", "ipc"])
def test_learner_and_engine_agree_before_and_after_an_update(strategy: str) -> None:
    found = gpu_vllm.run(Job(strategy, "random:tiny", **SMALL))
    assert "error" not in found
    assert found["values"].keys() == NAMES and all(x > 0 for x in found["values"].values())
    assert [row["what"] for row in found["rows"]] == OURS
    sync, token = found["rows"]
    assert 0 < sync["median"] < token["median"]
    assert (sync["bytes"] == 0) == ("share" not in sync) == (strategy == "alias")


@pytest.mark.vllm
def test_vllms_own_ways_bring_the_same_weights_to_the_same_engine() -> None:
    found = gpu_vllm.run(Job("copy", "tiny-qwen3", update=False, **SMALL))
    assert "error" not in found
    rows = {row["what"]: row for row in found["rows"]}
    assert not [row for row in rows.values() if "error" in row]
    model = random_models.in_memory("tiny-qwen3", choose_dtype("auto", "cpu")[0])
    read_and_written = 2 * sum(weight.nbytes for weight in model.parameters())
    expected = dict.fromkeys(("ours", *LOADED), read_and_written)
    expected |= dict.fromkeys(TWICE, 2 * read_and_written)
    assert {name: rows[f"{name}: sync"]["bytes"] for name in expected} == expected
    assert len(rows) == 2 * len(expected)
    for name in expected:
        row = rows[f"{name}: sync"]
        rate = 1e12 * found["values"]["copy TB/s"]
        assert row["share"] == pytest.approx(row["bytes"] / (1e-3 * row["median"]) / rate)
    for name in (*LOADED, *TWICE):
        for what in ("sync", "first token"):
            ratio = rows[f"{name}: {what}"]["median"] / rows[f"ours: {what}"]["median"]
            assert found["values"][f"{name} / ours, {what}"] == pytest.approx(ratio)


class Copies:
    """A learner and an engine of one number each; a push does `what`."""

    def __init__(self, what: str = "") -> None:
        self.what, self.learner, self.engine = what, 0, 0

    def change(self) -> None:
        self.learner += 1
        if self.what == "shares":
            self.engine = self.learner

    def push(self) -> None:
        if self.what == "fails":
            raise EngineError("vLLM moved it")
        if self.what != "forgets":
            self.engine = self.learner

    def verify(self) -> None:
        if self.engine != self.learner:
            raise EngineError("not the learner's")

    def first_token(self) -> None:
        pass


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("", ""),
        ("forgets", "EngineError: not the learner's"),
        ("fails", "EngineError: vLLM moved it"),
        ("shares", "EngineError: the engine had the learner's new weights before"),
    ],
)
def test_a_way_that_brings_nothing_is_an_error_and_not_timed(what: str, error: str) -> None:
    pair = Copies(what)
    way = vllm_pushes.Way(Job("copy", "tiny", device="cpu"), pair, pair.push)
    way.guarded(way.prove)
    way.guarded(way.time)
    assert way.error.startswith(error) and bool(way.error) == bool(error)
    rows = way.rows("ours", 1e9)
    assert [row["what"] for row in rows] == (OURS[:1] if error else OURS)
    assert all(("median" in row) != bool(error) for row in rows)


class Pair(vllm_pair.Pair):
    """Of an engine that draws by chance, is never updated, and is told other log-probs."""

    def __init__(self) -> None:
        nothing = SimpleNamespace(verify=lambda weights: None)
        policy = SimpleNamespace(named_weights=lambda: ())
        learner = SimpleNamespace(update=lambda rows, step: {})
        engine = SimpleNamespace(weights=nothing)
        super().__init__(policy, engine, (1, 2), SimpleNamespace(), learner)
        self.ids = [3, 4, 3]

    def sample(self, job: gpu_vllm.Job) -> list[Completion]:
        drawn = {"token_ids": [self.ids.pop()], "sampling_logprobs": [-1.0]}
        return [Completion(**drawn, finish_reason="length", weight_version=0)]

    def gap(self, completions: object) -> float:
        return float("nan")

    def push(self) -> None:
        self.pushed += 1

    def first_token(self) -> None:
        pass

    change = first_token


@pytest.fixture
def no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied to find out how fast that is."""
    monkeypatch.setattr(vllm_pushes, "copy_rate", lambda device: 1e9)


def test_what_does_not_hold_is_told(no_rate: None) -> None:
    found = gpu_vllm._checked(Job("alias", "random:tiny", device="cpu"), Pair(), {})
    assert found["error"] == (
        "wrong: gap before, gap after, one seed drew other tokens the second time, an update "
        "changed nothing that is sampled, completions do not name the update"
    )


def test_both_draws_of_a_seed_find_the_prompt_cached(
    monkeypatch: pytest.MonkeyPatch, no_rate: None
) -> None:
    calls: list[str] = []
    for name in ("first_token", "sample"):
        run = getattr(Pair, name)
        monkeypatch.setattr(Pair, name, lambda *a, n=name, r=run: calls.append(n) or r(*a))
    gpu_vllm._checked(Job("alias", "random:tiny", device="cpu"), Pair(), {})
    assert calls[:3] == ["first_token", "sample", "sample"]


def test_a_process_that_fails_or_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_vllm.run(Job("copy", "random:nothing"))
    assert "UserError" in found["error"] and "random:nothing" in found["error"]
    monkeypatch.setattr(gpu_pytest, "latest", time.monotonic() + 0.2)
    found = gpu_vllm.run(Job("copy", "random:tiny"))
    assert found == {"error": "not done after 0 s"}


def test_there_are_no_such_sections_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_vllm, "find_spec", lambda name: None)
    assert gpu_vllm.sections() == gpu_vllm.on_demand() == {}
    monkeypatch.setattr(gpu_vllm, "find_spec", lambda name: object())
    assert list(gpu_vllm.sections())[:2] == ["vllm alias", "vllm copy"]
    assert gpu_vllm.LIMIT < gpu_suite.LIMIT


def test_the_largest_sections_run_where_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = {"vllm copy 7B": len, "vllm step": len}
    monkeypatch.setattr(gpu_suite, "ON_DEMAND", largest)
    monkeypatch.setattr(gpu_suite, "SECTIONS", {"rates": len, "vllm copy": len} | largest)
    monkeypatch.setattr(sys, "argv", ["gpu_suite"])
    assert gpu_suite._options().only == ["rates", "vllm copy"]
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--only", "vllm copy 7B"])
    assert gpu_suite._options().only == ["vllm copy 7B"]
    assert gpu_suite._limit("vllm copy") == gpu_suite.LIMIT
    assert gpu_suite._limit("vllm copy 7B") > gpu_vllm.LARGEST_LIMIT
    monkeypatch.setattr(gpu_vllm, "find_spec", lambda name: object())
    assert gpu_vllm.LIMITS.keys() <= gpu_vllm.on_demand().keys()
