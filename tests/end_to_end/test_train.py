"""`python -m polymath_fast.train` as a user runs it, on a random two-layer model."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import time
from itertools import accumulate

import pytest
import torch
from safetensors.torch import load_file
from train_runs import command, make_flags, metrics, run, run_here

KEYS = (
    *("reward/mean", "reward/std", "completion/mean_length", "completion/truncated_ratio"),
    *("completion/distinct_ratio", "policy/entropy", "policy/kl", "policy/clip_ratio"),
    *("policy/grad_norm", "sampling/logprob_diff_mean", "sampling/logprob_diff_max", "time/step"),
    *("time/generate", "time/score", "time/learn", "time/sync"),
    *("throughput/completion_tokens_per_s", "memory/peak_gib"),
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder and the output of one run of `flags` from its beginning to its end."""
    folder = tmp_path_factory.mktemp("straight")
    return folder / "run", run(make_flags(folder), folder / "run").stdout


def test_learns_and_leaves_a_complete_run_folder(straight):
    folder, said = straight
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 11))
    learned = [row for row in rows if not row["update/skipped"]]  # all are "e" in the end, perhaps
    assert len(learned) >= 6 and all(set(KEYS) <= row.keys() for row in learned)
    assert rows[-1]["reward/mean"] > rows[0]["reward/mean"] + 0.3
    assert all(row["sampling/logprob_diff_mean"] < 0.03 for row in learned)
    names = {path.name for path in folder.iterdir()}
    assert {"config.toml", "metrics.jsonl", "completions.jsonl", "report.html"} <= names
    completions = (folder / "completions.jsonl").read_text().splitlines()
    assert len(completions) == 10 * 32
    versions = [json.loads(line)["weight_version"] for line in completions]
    updates = [0, *accumulate(int(not row["update/skipped"]) for row in rows)]
    assert versions == [updates[i // 32] for i in range(320)]  # at most one for a batch of 32
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {
        "step_000005", "step_000010",
    }  # fmt: skip
    assert "step_000010" in said


PARTIAL = [
    *("--num-generations", "8", "--oversample", "3", "--partial-rollouts"),
    *("--importance-sampling-mode", "token_truncate"),
    *("--temperature", "0.3", "--stop-repetition", "2"),  # completions end at different times
]


def partial(flags):
    return [*(word.replace(":vowels", ":even") for word in flags), *PARTIAL]


@pytest.mark.parametrize("kept", [False, True], ids=["plain", "partial"])
def test_kill_and_resume_equals_a_straight_run_bit_for_bit(flags, tmp_path, kept, straight):
    whole = straight[0]
    if kept:
        flags, whole = partial(flags), tmp_path / "straight"
        run_here(flags, whole)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command(flags, tmp_path / "killed"), stdout=log, stderr=log)
    deadline = time.monotonic() + 200
    path = tmp_path / "killed/metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= 7):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run([*flags, "--resume", "auto"], tmp_path / "killed")
    if kept:
        state = whole / "checkpoints/step_000005/trainer/state.json"
        assert json.loads(state.read_text())["pending"]

    rows, killed = metrics(whole), metrics(tmp_path / "killed")
    assert [figures(row) for row in killed] == [figures(row) for row in rows]
    for name in ("model.safetensors", "trainer/state.safetensors"):
        one = payload(whole / "checkpoints/step_000010" / name)
        two = payload(tmp_path / "killed/checkpoints/step_000010" / name)
        assert one == two
    assert (whole / "completions.jsonl").read_bytes() == (
        tmp_path / "killed/completions.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_aborted_completions_go_on_in_the_next_step(flags, tmp_path, monkeypatch, engine):
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # vLLM's short warm-up
    proof = ["--verify-sync", "--reuse-kv-cache"] if engine == "vllm" else []
    more = ["--max-steps", "4", "--engine", engine, *proof]
    # vLLM leaves a process other than it was
    (run if engine == "vllm" else run_here)([*partial(flags), *more], tmp_path / "run")
    rows = metrics(tmp_path / "run")
    lines = (tmp_path / "run/completions.jsonl").read_text().splitlines()
    completions = [json.loads(line) for line in lines]
    assert len(completions) == 4 * 16
    continued = [row for row in completions if "weight_versions" in row]
    assert rows[0]["partial/continued"] == 0 and continued
    assert sum(row["partial/continued"] for row in rows) == len(continued)
    newest = {row["step"]: row["weight_version"] for row in completions}
    assert all(row["weight_version"] == newest[row["step"]] for row in completions)
    for row in continued:
        versions, starts = zip(*row["weight_versions"], strict=True)
        assert list(versions) == sorted(set(versions)) and versions[-1] == row["weight_version"]
        assert list(starts) == sorted(set(starts)) and starts[0] == 0 < row["length"] - starts[-1]
    for row in rows:
        assert row["oversample/aborted"] > 0
        assert ("memory/kv_reused_gib" in row) == (engine == "vllm")
        assert engine != "vllm" or row["update/skipped"] or row["memory/kv_reused_gib"] > 0
        assert (row["partial/stale_token_ratio"] > 0) == (row["partial/continued"] > 0)
    # stale tokens are off policy: the learner's log-probs of them are not the sampler's
    stalest = max(rows, key=lambda row: row["partial/stale_token_ratio"])
    assert stalest["sampling/logprob_diff_max"] > 3 * rows[0]["sampling/logprob_diff_max"]


def figures(row):
    """All of a row but what was timed."""
    timed = ("time/", "throughput/", "memory/")
    return {key: value for key, value in row.items() if not key.startswith(timed)}


def test_a_resumed_run_drafts_as_a_straight_one_bit_for_bit(flags, tmp_path):
    """What is remembered for drafts decides the shapes of products, and so their rounding."""
    flags = [*flags, "--speculate", "4", "--temperature", "0.3", "--num-generations", "4"]
    run_here([*flags, "--max-steps", "4"], tmp_path / "straight")
    run_here([*flags, "--max-steps", "2"], tmp_path / "stopped")
    run([*flags, "--max-steps", "4", "--resume", "auto"], tmp_path / "stopped")
    straight, stopped = metrics(tmp_path / "straight"), metrics(tmp_path / "stopped")
    assert [figures(row) for row in stopped] == [figures(row) for row in straight]
    assert straight[-1]["speculation/drafted"] > 0
    assert straight[-1]["speculation/acceptance_length"] > 1
    name = "checkpoints/step_000004/trainer/state.safetensors"
    assert payload(tmp_path / "stopped" / name) == payload(tmp_path / "straight" / name)
    assert (tmp_path / "straight/completions.jsonl").read_bytes() == (
        tmp_path / "stopped/completions.jsonl"
    ).read_bytes()


def payload(path):
    """Raw bytes of the tensors; numpy has no bfloat16, so the file's payload is compared."""
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    return content[8 + header :]


def test_without_learning_nothing_drifts(flags, tmp_path):
    run_here([*flags, "--learning-rate", "0", "--beta", "0.1"], tmp_path / "run")
    rows = metrics(tmp_path / "run")
    for row in rows:
        assert row["sampling/logprob_diff_mean"] < 0.03
        assert row["policy/ratio_max"] == row["policy/ratio_mean"] == 1.0
        assert abs(row["policy/kl"]) < 1e-9
    drift = rows[-1]["sampling/logprob_diff_mean"] - rows[0]["sampling/logprob_diff_mean"]
    assert abs(drift) < 0.01


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(flags, tmp_path):
    flags = [*flags, "--max-steps", "10000", "--save-every", "0"]
    process = subprocess.Popen(
        command(flags, tmp_path / "run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    path = tmp_path / "run/metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert "--resume auto" in output
    steps = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / f"run/checkpoints/step_{steps:06d}/model.safetensors").is_file()


def test_updates_per_batch_and_every_regulariser_at_once(flags, tmp_path):
    more = [
        *("--updates-per-batch", "2", "--beta", "0.01", "--entropy-coef", "0.001"),
        *("--max-steps", "3", "--epsilon-high", "0.28", "--loss-type", "grpo"),
        *("--tokens-per-microbatch", "128"),
    ]
    run_here([*flags, *more], tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert rows[0]["policy/ratio_max"] > 1.0
    assert rows[1]["policy/kl"] > 0
    assert all(math.isfinite(row["policy/grad_norm"]) for row in rows)


def test_the_tape_saves_the_forward_pass_and_changes_nothing_else(flags, tmp_path):
    taped, plain, little = (tmp_path / name for name in ("taped", "plain", "little"))
    # small steps: AdamW makes whole ones of rounding, and one drawn token more that differs
    flags = [*flags, "--dtype", "float32", "--max-steps", "3", "--learning-rate", "1e-5"]
    for folder, more in (
        (taped, []),
        (plain, ["--tape-gib", "0"]),
        (little, ["--tape-gib", "5e-4"]),
    ):
        run_here([*flags, *more], folder)
    found, truth, some = (metrics(folder) for folder in (taped, plain, little))
    assert all(row["packing/taped_ratio"] == 1 for row in found)
    assert all(row["packing/taped_ratio"] == 0 for row in truth)
    assert all(0 < row["packing/taped_ratio"] < 1 for row in some)
    for row, same, other in zip(found, truth, some, strict=True):
        assert row["reward/mean"] == same["reward/mean"] == other["reward/mean"]
        for key in ("policy/grad_norm", "policy/entropy"):
            assert row[key] == pytest.approx(same[key], rel=1e-4) == other[key]


def test_an_offloaded_optimizer_is_saved_and_resumed_as_any_other(flags, tmp_path):
    """Bit for bit, from either into either."""
    here, away = tmp_path / "here", tmp_path / "away"
    flags = [*flags, "--save-every", "1", "--master-weights", "float32"]
    run_here([*flags, "--max-steps", "2"], here)
    run_here([*flags, "--max-steps", "1"], away)
    run_here([*flags, "--max-steps", "2", "--offload-optimizer", "--resume", "auto"], away)
    files = ("trainer/state.safetensors", "model.safetensors")
    for name in files:
        one, other = (load_file(f / "checkpoints" / "step_000002" / name) for f in (here, away))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    run_here([*flags, "--max-steps", "3"], here := tmp_path / "again")
    run_here([*flags, "--max-steps", "3", "--resume", "auto"], away)
    one, other = (load_file(f / "checkpoints" / "step_000003" / files[0]) for f in (here, away))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_resume_refuses_another_model(flags, tmp_path, straight, capsys):
    shutil.copytree(straight[0], tmp_path / "run")
    other = [*flags, "--model", "random:tiny-qwen3", "--resume", "auto"]
    run_here(other, tmp_path / "run", expect=2)
    said = capsys.readouterr().err
    assert "random:tiny-qwen3" in said and "of random:tiny," in said
