"""Problem files, and an evaluation whose engine answers by a script."""

from __future__ import annotations

import json

import pytest
from letters import Letters, Scripted

from polymath_fast import evaluate


@pytest.fixture
def file_of(tmp_path):
    def write(name: str, *rows: dict) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def scripted(monkeypatch):
    """Runs the command with a scripted model in place of a real one."""
    engines = []

    def run(script, *flags: str) -> int:
        engines.append(Scripted(script))
        monkeypatch.setattr(evaluate.models, "resolve_model", lambda *_: "somewhere")
        monkeypatch.setattr(evaluate.models, "context_length", lambda _: 200)
        monkeypatch.setattr(evaluate, "load_tokenizer", lambda _: Letters())
        monkeypatch.setattr(evaluate.rollout, "stop_token_ids", lambda *_: [0])
        monkeypatch.setattr(evaluate.rollout, "build_engine", lambda *_, **__: engines[-1])
        plain = ["--template", "plain", "--instruction", "", "--max-completion-length", "50"]
        asking = [] if "--result-path" in flags else [*plain, "--engine", "transformers"]
        return evaluate.main([*asking, *flags])

    yield run
    assert all(engine.closed for engine in engines if engine.calls)
