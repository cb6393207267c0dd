"""Reward functions of users, at their worst: none of them ends, blocks or soils the run."""

from __future__ import annotations

import datetime
import subprocess
import sys
import textwrap
import time

import numpy
import pytest

from polymath_fast import rewards
from polymath_fast.errors import UserError
from polymath_fast.rewards import user

TEN = [f"text {k}" for k in range(10)]


@pytest.fixture
def reward_of(tmp_path):
    """Builds a reward set from the source of a function called `reward`."""
    built = []

    def build(source: str, timeout: float = 1.0) -> rewards.RewardSet:
        path = tmp_path / f"mine_{len(built)}.py"
        path.write_text(textwrap.dedent(source))
        built.append(rewards.build([f"{path}:reward"], timeout=timeout))
        return built[-1]

    yield build
    for reward_set in built:
        reward_set.close()


def score(reward_set, completions=TEN, **columns):
    size = len(completions)
    columns = {"answer": ["5"] * size, **columns}
    return reward_set.score(["p"] * size, completions, [[1, 2]] * size, columns)


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


def test_the_signature_is_trls(reward_of):
    result = score(
        reward_of("""
            import os
            state = []

            def reward(prompts, completions, completion_ids, answer, **columns):
                state.append(1)
                assert prompts == ["p"] * 10 and completion_ids == [[1, 2]] * 10
                return [len(state) + float(a) + c.count("7") * w
                        for c, a, w in zip(completions, answer, columns["weight"])]
        """),
        weight=numpy.arange(10.0),
    )
    assert result.total == [6.0] * 7 + [13.0] + [6.0] * 2


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


def test_a_function_gets_only_what_it_accepts(reward_of):
    built = reward_of("def reward(completions, answer, level=3): return [level] * len(completions)")
    assert score(built, unused=[datetime.date(2026, 1, 1)] * 10).total == [3.0] * 10
    with pytest.raises(UserError, match="asks for 'difficulty', which no column has; .*answer"):
        score(reward_of("def reward(completions, difficulty): return [1.0]"))


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


def test_the_run_keeps_its_own_copies(reward_of):
    completions, level = list(TEN), [[1] for _ in TEN]
    built = reward_of("""
        def reward(completions, level, **columns):
            completions[0] = "changed"
            level[0].append(2)
            return [1.0] * len(completions)
    """)
    assert score(built, completions, level=level).total == [1.0] * 10
    assert completions == TEN
    assert level == [[1]] * 10


@pytest.mark.parametrize("source", ["reward = lambda completions, **columns: [1.0] * 10", None])
def test_lambdas_and_closures_are_functions_too(reward_of, source):
    built = reward_of(
        source
        or """
        def make(value):
            def inner(completions, **columns):
                return [value] * len(completions)
            return inner

        reward = make(1.0)
        """
    )
    assert score(built).total == [1.0] * 10


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def other(): pass", "no function 'reward' in it; it defines other"),
        ("reward = 5", "no function 'reward' in it; it defines no function"),
        ("def reward(:", r"SyntaxError.*\(mine_0.py line 1\)"),
        ("import no_such_module_here", "No module named 'no_such_module_here'.*line 1"),
        ("import sys; sys.exit('not today')", "SystemExit: not today"),
        ("import os; os._exit(4)", "ended at import: exit code 4"),
    ],
)
def test_what_cannot_be_loaded_is_said_at_once(reward_of, source, said):
    with pytest.raises(UserError, match=f"mine_0.py:reward: .*{said}"):
        reward_of(source)


def test_a_module_that_hangs_at_import_is_given_up(reward_of, monkeypatch):
    monkeypatch.setattr(user, "LOAD_TIMEOUT", 0.4)
    with pytest.raises(UserError, match="it did not start in time"):
        reward_of("import time; time.sleep(60)")


def test_functions_of_modules(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def brief(completions): return [-len(c) for c in completions]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with rewards.build(["my_rewards:brief", "format"], [0.5, 1.0]) as built:
        assert score(built).total == [-3.0] * 10
    with pytest.raises(UserError, match="No module named 'my_other_rewards'"):
        rewards.build(["my_other_rewards:brief"])


def test_names_are_short_and_distinct(tmp_path, reward_of):
    source = "def reward(completions): return [1.0] * len(completions)"
    built = reward_of(source)
    assert list(score(built).per_reward) == ["mine_0.py:reward"]
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "mine_0.py"
    twin.write_text(source)
    with pytest.raises(UserError, match="two rewards are called mine_0.py:reward"):
        rewards.build([f"{tmp_path}/mine_0.py:reward", f"{twin}:reward"])


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
