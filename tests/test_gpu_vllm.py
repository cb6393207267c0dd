"""The GPU suite's sections with vLLM, on a CPU: they run, and tell what is wrong."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from benchmarks import gpu_pytest, gpu_suite, gpu_vllm
from polymath_fast.rollout.types import Completion

SMALL = {"device": "cpu", "completions": 16, "length": 24, "prompt": 20, "repeats": 2}
NAMES = {
    *("start s", "gap before", "gap after"),
    *("sync ms", "sync and first token ms", "first token alone ms"),
}


@pytest.mark.vllm
@pytest.mark.parametrize("strategy", ["alias", "ipc"])
def test_learner_and_engine_agree_before_and_after_an_update(strategy: str) -> None:
    found = gpu_vllm.run(gpu_vllm.Job(strategy, "random:tiny", **SMALL))
    assert "error" not in found
    assert found["values"].keys() == NAMES and all(x > 0 for x in found["values"].values())


class Pair(gpu_vllm._Pair):
    """Of an engine that draws by chance, is never updated, and is told other log-probs."""

    def __init__(self) -> None:
        nothing = SimpleNamespace(verify=lambda weights: None)
        policy = SimpleNamespace(named_weights=lambda: ())
        learner = SimpleNamespace(update=lambda rows, step: {}, policy=policy)
        super().__init__(learner, SimpleNamespace(weights=nothing), (1, 2))
        self.ids = [3, 4, 3]

    def sample(self, job: gpu_vllm.Job) -> list[Completion]:
        drawn = {"token_ids": [self.ids.pop()], "sampling_logprobs": [-1.0]}
        return [Completion(**drawn, finish_reason="length", weight_version=0)]

    def gap(self, completions: object) -> float:
        return float("nan")

    def push(self) -> None:
        pass

    first_token = push


def test_what_does_not_hold_is_told() -> None:
    found = gpu_vllm._checked(gpu_vllm.Job("copy", "random:tiny"), Pair(), {})
    assert found["error"] == (
        "wrong: gap before, gap after, one seed drew other tokens the second time, an update "
        "changed nothing that is sampled, completions do not name the update"
    )


def test_both_draws_of_a_seed_find_the_prompt_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("first_token", "sample"):
        run = getattr(Pair, name)
        monkeypatch.setattr(Pair, name, lambda *a, n=name, r=run: calls.append(n) or r(*a))
    gpu_vllm._checked(gpu_vllm.Job("copy", "random:tiny"), Pair(), {})
    assert calls[:3] == ["first_token", "sample", "sample"]


def test_a_process_that_fails_or_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_vllm.run(gpu_vllm.Job("copy", "random:nothing"))
    assert "UserError" in found["error"] and "random:nothing" in found["error"]
    monkeypatch.setattr(gpu_pytest, "latest", time.monotonic() + 0.2)
    found = gpu_vllm.run(gpu_vllm.Job("copy", "random:tiny"))
    assert found == {"error": "not done after 0 s"}


def test_there_are_no_such_sections_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_vllm, "find_spec", lambda name: None)
    assert gpu_vllm.sections() == {}
    monkeypatch.setattr(gpu_vllm, "find_spec", lambda name: object())
    assert list(gpu_vllm.sections())[:2] == ["vllm alias", "vllm copy"]
    assert gpu_vllm.LIMIT < gpu_suite.LIMIT
