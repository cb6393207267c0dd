"""`--num-processes` as a user runs it: several processes on the cores of one CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from endings import assert_same_end, newest
from train_runs import command, make_flags, metrics, run, run_here

from polymath_fast.ranks import launch

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="every process needs a core of its own"
)
SLOWER = """
import time
_vowels = vowels

def vowels(*given, **columns):
    time.sleep(0.5)
    return _vowels(*given, **columns)
"""
BREAKS_IN_A_MEMBER = """
import os
from pathlib import Path
_vowels, calls = vowels, 0

def vowels(*given, **columns):
    global calls
    calls += 1
    judged = _vowels(*given, **columns)
    parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    return judged[1:] if calls == 5 and b"ranks.member" in parent else judged
"""
TIMES = ("time/", "throughput/", "memory/")


def flags_of(folder: Path, *more: str) -> list[str]:
    return [
        *make_flags(folder),
        "--num-processes",
        "2",
        "--max-steps",
        "6",
        "--save-every",
        "3",
        *more,
    ]


def members(parent: int) -> list[int]:
    """Processes that `parent` started to share its run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            above = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if above == parent and b"polymath_fast.ranks.member" in words:
            found.append(int(path.name))
    return found


def comparable(folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if not name.startswith(TIMES)}
        for row in metrics(folder)
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("straight")
    return folder / "run", run(flags_of(folder), folder / "run").stdout


def test_two_processes_draw_and_learn_whole_groups(straight: tuple[Path, str]) -> None:
    folder, said = straight
    assert "2, each with its part of the cores and of every group" in said
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[-1]["reward/mean"] > rows[0]["reward/mean"]
    drawn = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    places = Counter((row["step"], row["group"]) for row in drawn)
    assert places == Counter({(step, group): 16 for step in range(1, 7) for group in (0, 1)})
    for row in rows:
        of_step = [each for each in drawn if each["step"] == row["step"]]
        assert row["reward/mean"] == pytest.approx(sum(e["reward"] for e in of_step) / 32)
        lengths = sum(each["length"] for each in of_step)
        assert row["completion/mean_length"] == pytest.approx(lengths / 32)
    texts = [each["completion"] for each in drawn if each["step"] == 1]
    assert not set(texts[:8]) & set(texts[8:16])  # the processes draw with seeds of their own
    assert rows[1]["sampling/logprob_diff_mean"] < 0.03  # everybody samples from the new weights


def test_everything_at_once(tmp_path: Path) -> None:
    """Options that look at the whole batch, each process with its part of it."""
    problems = tmp_path / "held_out.jsonl"
    lines = [{"problem": f"Say {letter}.", "answer": "e"} for letter in "abc"]
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "one.jsonl").write_text(json.dumps(lines[0]) + "\n")  # fewer than processes
    more = [
        *("--beta", "0.01", "--entropy-coef", "0.001", "--updates-per-batch", "2"),
        *("--num-train-generations", "9", "--oversample", "0.3", "--partial-rollouts"),
        *("--importance-sampling-mode", "token_truncate", "--on-saturation", "resample"),
        *("--eval-dataset", str(problems), str(tmp_path / "one.jsonl")),
        *("--eval-every", "2", "--eval-k", "2"),
        *(
            "--eval-temperature",
            "1",
            "--verify-sync",
            "--speculate",
            "2",
            "--shard-optimizer",
            "--num-generations",
            "15",
        ),
    ]
    run(flags_of(tmp_path, *more), tmp_path / "run")
    rows = metrics(tmp_path / "run")
    graded = [
        row["eval/held_out/completions"] for row in rows if "eval/held_out/completions" in row
    ]
    assert graded == [6, 6, 6, 6]
    assert [r["eval/one/completions"] for r in rows if "eval/one/completions" in r] == [2] * 4
    drawn = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    steps = Counter(json.loads(line)["step"] for line in drawn)
    assert set(steps) == set(range(1, 7)) and all(count % 30 == 0 for count in steps.values())


def started(flags: list[str], folder: Path, until: str = "metrics.jsonl") -> subprocess.Popen[str]:
    """A run that has made its first step, or that has got as far as a file in its folder."""
    process = subprocess.Popen(
        command(flags, folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (folder / until).exists() or not (folder / until).stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_ctrl_c_stops_all_of_them_after_the_step(tmp_path: Path) -> None:
    process = started(flags_of(tmp_path, "--max-steps", "100000"), tmp_path / "run")
    others = members(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err and err.count("finishing this step") == 1
    assert "go on with:" in out and newest(tmp_path / "run").step == len(metrics(tmp_path / "run"))
    assert len(others) == 1 and not Path(f"/proc/{others[0]}").exists()


def test_a_process_that_is_killed_ends_the_run_which_is_saved(tmp_path: Path) -> None:
    flags = flags_of(tmp_path, "--max-steps", "100000", "--save-every", "0")
    process = started(flags, tmp_path / "run")
    os.kill(members(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    assert "Traceback" not in err and "one of the 2 processes of this run" in err
    assert newest(tmp_path / "run").step == len(metrics(tmp_path / "run"))


def test_members_end_with_a_leader_that_is_killed_and_the_run_resumes_bit_for_bit(
    straight: tuple[Path, str], tmp_path: Path
) -> None:
    flags, folder = flags_of(tmp_path), tmp_path / "run"
    with (tmp_path / "my_reward.py").open("a") as file:
        file.write(SLOWER)
    process = started(flags, folder, until="checkpoints/step_000003")
    others = members(process.pid)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in others):
        assert others and time.monotonic() < deadline
        time.sleep(0.05)
    run([*flags, "--resume", "auto"], folder)
    assert comparable(folder) == comparable(straight[0])
    assert_same_end(folder, straight[0])


def test_a_run_with_a_sharded_optimizer_is_saved_by_all_and_ends_as_one_without(
    straight: tuple[Path, str], tmp_path: Path
) -> None:
    """One of them fails in step 5, and none is gone."""
    flags, folder = flags_of(tmp_path), tmp_path / "run"
    code = (tmp_path / "my_reward.py").read_text()
    (tmp_path / "my_reward.py").write_text(code + BREAKS_IN_A_MEMBER)
    done = run([*flags, "--shard-optimizer"], folder, expect=2)
    assert "the other process refused: --reward" in done.stderr and "Traceback" not in done.stderr
    assert "saved" in done.stdout and newest(folder).step == 4 == len(metrics(folder))
    (tmp_path / "my_reward.py").write_text(code)
    run([*flags, "--shard-optimizer", "--resume", "auto"], folder)
    assert comparable(folder) == comparable(straight[0])
    assert_same_end(folder, straight[0])
    state = "trainer/state.safetensors"
    ours, theirs = newest(folder).path / state, newest(straight[0]).path / state
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_part_of_the_optimizer_that_is_gone_is_said(
    straight: tuple[Path, str], tmp_path: Path
) -> None:
    began = straight[0] / "checkpoints" / "step_000003"
    flags = flags_of(tmp_path, "--max-steps", "100000", "--shard-optimizer", "--save-every", "0")
    with (tmp_path / "my_reward.py").open("a") as file:
        file.write(SLOWER)
    process = started([*flags, "--resume", str(began)], tmp_path / "run")
    os.kill(members(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    assert "Traceback" not in err and "of this run" in err
    said = " ".join(out.split())
    assert "process 1 of this run is lost" in said
    assert "--shard-optimizer keeps nowhere else; nothing was saved" in said
    assert "go on from where this run began" in said
    assert newest(tmp_path / "run") is None
    assert comparable(tmp_path / "run")[0] == comparable(straight[0])[3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-processes", "1", "--shard-optimizer"], "pass --num-processes 2 or more"),
        (["--num-processes", "64"], "this run sees"),
        (["--num-generations", "3"], "--num-generations is 3; --num-processes 1 works"),
        (["--num-processes", "0"], "--num-processes"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags_of(tmp_path), "--num-generations", "128", *more]
    run_here(flags, tmp_path / "run", expect=2)
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_cores_and_devices_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {8, 1, 5, 2, 3})
    assert launch.core_shares(2) == [[1, 2], [3, 5, 8]]
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.visible_devices() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-af,7,9")
    assert launch.visible_devices() == ["4", "GPU-af", "7"]
