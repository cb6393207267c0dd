"""Reward functions of users, at their worst: none of them ends, blocks or soils the run."""

from __future__ import annotations

import datetime
import subprocess
import sys
import time

import pytest
from rewarded import TEN, score

from polymath_fast.errors import UserError
from polymath_fast.rewards import user


def test_a_process_without_standard_streams_has_rewards(tmp_path):
    """The numbers of its streams are free, and a pipe takes them."""
    (tmp_path / "mine.py").write_text("def reward(completions, **_):\n    return [1.0]\n")
    code = (
        "import os, sys\nfor number in (0, 1):\n    os.close(number)\n"
        "from polymath_fast import rewards\n"
        f"built = rewards.build(['{tmp_path}/mine.py:reward'])\n"
        "found = built.score(['p'], ['c'], [[1]], {'answer': ['5']}).total\n"
        "built.close()\nsys.exit(found != [1.0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_coroutine_function_keeps_its_event_loop(reward_of):
    built = reward_of("""
        import asyncio

        lock, loops = asyncio.Lock(), []

        async def judged(text):
            async with lock:
                await asyncio.sleep(0)
                loops.append(asyncio.get_running_loop())
            return float(text[-1])

        async def reward(completions, **columns):
            values = await asyncio.gather(*map(judged, completions))
            return values if len(set(loops)) == 1 else None
    """)
    for _ in range(2):
        assert score(built).total == [float(k) for k in range(10)]


def test_a_coroutine_function_may_fail(reward_of):
    built = reward_of("""
        async def reward(completions, **columns):
            if "text 3" in completions:
                raise ValueError("three")
            return [1.0] * len(completions)
    """)
    assert score(built).total == [1.0, 1.0, 1.0, None, *[1.0] * 6]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1.0", "returned a float: expected a list of 10 numbers"),
        ("return [1.0] * 9", "returned 9 rewards for 10 completions"),
        ("return [1.0] * 11", "returned 11 rewards for 10 completions"),
        ("return [None] * 10", "gave None for all 10"),
        ("return [float('nan')] * 10", "returned nan at position 0"),
        ("return [0.0] * 9 + [float('inf')]", "returned inf at position 9"),
        ("return ['1.0'] * 10", "returned a str at position 0"),
        ("return (1.0 for _ in completions)", "returned a generator"),
        ("import numpy; return numpy.ones(10)", r"returned a ndarray; call .tolist\(\)"),
        ("return None", "returned a NoneType"),
        ("yield 1.0", "returned a generator"),
        ("return [1e30] * 10", "must be finite and at most 1e\\+06"),
    ],
)
def test_a_broken_contract_is_one_clear_error(reward_of, body, said):
    with pytest.raises(UserError, match=f"mine_0.py:reward.*{said}"):
        score(reward_of(f"def reward(completions, **columns): {body}"))


def test_numbers_of_every_kind_are_welcome(reward_of):
    built = reward_of("""
        import numpy

        def reward(completions, **columns):
            return [1, True, False, None, 0.5, numpy.float32(0.25), numpy.int8(-2),
                    numpy.bool_(True), -1e6, 0]
    """)
    assert score(built).total == [1.0, 1.0, 0.0, None, 0.5, 0.25, -2.0, 1.0, -1e6, 0.0]


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("raise RuntimeError('bad text')", "raised RuntimeError: bad text"),
        ("import sys; sys.exit(0)", "raised SystemExit: 0"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("import os; os._exit(0)", "ended its process (exit code 0)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import time; time.sleep(99)", "did not return within 0.5 s and was killed"),
        ("import re; re.match('(a+)+$', 'a' * 60 + 'b')", "did not return within 0.5 s"),
        ("bytearray(2**32)", "raised MemoryError"),
    ],
)
def test_trouble_with_one_completion_excludes_only_that_one(reward_of, monkeypatch, trouble, said):
    monkeypatch.setattr(user, "memory_limit", lambda: 2**30)
    built = reward_of(
        f"""
        def reward(completions, **columns):
            for text in completions:
                if text.endswith("4"):
                    {trouble}
            return [1.0] * len(completions)
        """,
        timeout=0.5,
    )
    result = score(built, TEN[:5])
    assert result.total == [1.0] * 4 + [None]
    assert result.metrics["reward/excluded_ratio"] == 0.2
    assert said in result.notes[0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [float(text) for text in completions]", r"could not convert .*mine_0.py line 1"),
        ("import os; os._exit(3)", "exit code 3"),
    ],
)
def test_trouble_with_most_completions_is_an_error(reward_of, body, said):
    with pytest.raises(UserError, match=f"failed on 3 of 3 completions.*{said}.*a fifth"):
        score(reward_of(f"def reward(completions, **columns): {body}"))


def test_noise_goes_nowhere(reward_of, capfd):
    built = reward_of("""
        import os, subprocess, sys
        print("loaded")

        def reward(completions, **columns):
            print("noise " * 100_000)
            print("noise " * 100_000, file=sys.stderr)
            subprocess.run(["echo", "more noise"])
            os.write(1, b'{"rewards": [9]}')
            return [1.0] * len(completions)
    """)
    assert score(built).total == [1.0] * 10
    assert capfd.readouterr() == ("", "")


def test_a_daemon_that_keeps_the_output_open_does_not_block(reward_of):
    built = reward_of("""
        import os, time

        def reward(completions, **columns):
            if os.fork() == 0:
                os.setsid()
                time.sleep(20)
                os._exit(0)
            return [1.0] * len(completions)
    """)
    begun = time.monotonic()
    assert score(built).total == [1.0] * 10
    built.close()
    assert time.monotonic() - begun < 10


def test_a_child_that_returns_too_is_not_heard(reward_of):
    built = reward_of("""
        import os, time

        def reward(completions, **columns):
            if os.fork() == 0:
                return [9.0] * len(completions)
            time.sleep(0.3)
            return [1.0] * len(completions)
    """)
    for _ in range(2):
        assert score(built).total == [1.0] * 10


def test_columns_that_cannot_be_passed_are_named(reward_of):
    built = reward_of("def reward(completions, **columns): return [1.0] * len(completions)")
    with pytest.raises(UserError, match="column 'blob' holds a bytes"):
        score(built, blob=[b"x"] * 10)
    with pytest.raises(UserError, match="column 'prompts' has the name of an argument"):
        built.score(["p"], ["c"], [[1]], {"prompts": ["p"]})
    assert score(built, self=[1] * 10, when=[datetime.date(2026, 1, 1)] * 10).total == [1.0] * 10


def test_equal_rewards_are_passed_on(reward_of):
    built = reward_of("def reward(completions, **columns): return [0.5] * len(completions)")
    assert [score(built).total for _ in range(3)] == [[0.5] * 10] * 3
