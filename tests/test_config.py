"""Settings: precedence, the single place of defaults, files that read back, clean imports."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from polymath_fast.config import SECTIONS, Config, toml_flags
from polymath_fast.config.command_line import parse
from polymath_fast.errors import UserError

PRESETS = sorted(path.stem for path in toml_flags.PRESETS.glob("*.toml"))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_importing_the_settings_loads_nothing_heavy() -> None:
    heavy = "('torch', 'transformers', 'tyro', 'numpy', 'datasets')"
    code = f"import polymath_fast.config, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_defaults_of_the_general_recipe() -> None:
    settings = Config()
    assert (settings.learning_rate, settings.temperature) == (1e-6, 1.0)
    assert (settings.num_generations, settings.groups_per_step) == (64, 8)
    assert settings.loss_type == "dapo"
    assert settings.dataset == "shipped:rectangle"


def test_the_embedded_model_starts_from_the_demo_preset() -> None:
    demo = tomllib.loads((toml_flags.PRESETS / "cpu_demo.toml").read_text())
    settings = parse([])
    assert demo and all(getattr(settings, name) == value for name, value in demo.items())
    assert parse(["--model", "embedded:smollm2"]) == settings


@pytest.mark.parametrize("model", [["--model", "some/folder"], ["--model=random:tiny"]])
def test_another_model_starts_from_the_defaults(model: list[str]) -> None:
    assert parse(model).num_generations == Config().num_generations


def test_an_empty_config_file_replaces_the_demo_preset(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.toml", "")
    assert parse(["--config", empty]) == Config()


def test_later_files_win_and_flags_win_over_all(tmp_path: Path) -> None:
    first = write(tmp_path / "1.toml", "seed = 1\nmax_steps = 11\nnum_generations = 3")
    second = write(tmp_path / "2.toml", "seed = 2\nmax-steps = 12")
    # The flag stands before the files and still wins.
    settings = parse(["--seed", "9", "--config", first, second])
    assert (settings.seed, settings.max_steps, settings.num_generations) == (9, 12, 3)
    swapped = parse(["--config", second, "--config", first])
    assert (swapped.seed, swapped.max_steps) == (1, 11)


def test_presets_and_files_mix(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.toml", "num_generations = 8")
    settings = parse(["--config", "polymath_7b", mine])
    assert (settings.model, settings.num_generations) == ("Qwen/Qwen2.5-7B", 8)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_says_what_it_is(name: str) -> None:
    assert (toml_flags.PRESETS / f"{name}.toml").read_text().startswith("# ")
    assert isinstance(parse(["--config", name]), Config)


def test_the_published_recipes() -> None:
    one_shot = parse(["--config", "one_shot_rlvr_1.5b"])
    assert one_shot.num_generations * one_shot.groups_per_step == 1024
    assert (one_shot.temperature, one_shot.max_completion_length) == (0.6, 3072)
    assert (one_shot.beta, one_shot.entropy_coef, one_shot.weight_decay) == (0.001, 0.001, 0.01)
    polymath = parse(["--config", "polymath_7b"])
    assert polymath.num_generations * polymath.groups_per_step == 2048
    assert (polymath.template, polymath.beta, polymath.max_steps) == ("polymath", 0.0, 140)


def test_a_question_displaces_the_dataset_of_a_file_and_the_reverse(tmp_path: Path) -> None:
    asked = parse(["--config", "polymath_7b", "--question", "6 * 7?", "--answer", "42"])
    assert (asked.question, asked.dataset) == ("6 * 7?", None)
    file = write(tmp_path / "q.toml", 'question = "6 * 7?"\nanswer = "42"')
    other = parse(["--config", file, "--dataset", "mine.jsonl"])
    assert (other.question, other.answer, other.dataset) == (None, None, "mine.jsonl")


AWKWARD = {
    "question": 'Ünï "quotes" \\boxed{} \n second line \t = [1] # no comment\u2028',
    "answer": "-5",
    "instruction": "",
    "reward": ("math", "my file.py:fn"),
    "reward_weights": (-1.5, 2e-7),
    "max_grad_norm": float("inf"),
    "learning_rate": 1.2345678901234567e-05,
    "eval_dataset": (),
    "log_to": ("wandb", "tensorboard"),
    "output_dir": "--runs/a b",
    "mask_truncated_completions": True,
    "epsilon_high": 0.28,
    "max_samples": 1,
    "threads": 2,
}


@pytest.mark.parametrize("values", [{}, AWKWARD], ids=["defaults", "awkward"])
def test_the_resolved_settings_read_back_equal(values: dict, tmp_path: Path) -> None:
    settings = Config(**values)
    settings.write(tmp_path / "config.toml")
    assert parse(["--config", str(tmp_path / "config.toml")]) == settings
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_the_resolved_settings_of_the_demo_read_back_equal(tmp_path: Path) -> None:
    settings = parse([])
    settings.write(tmp_path / "config.toml")
    assert parse(["--config", str(tmp_path / "config.toml")]) == settings


def test_none_is_always_the_default_where_it_is_allowed() -> None:
    """Otherwise leaving None out of a file would change its meaning."""
    hints = get_type_hints(Config)
    for field in dataclasses.fields(Config):
        if type(None) in get_args(hints[field.name]):
            assert field.default is None, field.name


def test_every_setting_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in shown, field.name
    assert "--dry-run" in shown and "--rollout." not in shown
    for title in SECTIONS:
        assert f"{title} options" in shown


def test_underscores_are_as_good_as_hyphens() -> None:
    assert parse(["--num_generations", "5"]).num_generations == 5


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-generations", "4.0"], "--num-generations is '4.0'; it must be a whole number; 8"),
        (["--temperature", "abc"], "--temperature is 'abc'; it must be a number; 1 works"),
        (["--reward-weights", "1", "x"], "--reward-weights is 'x'; it must be a number"),
        (["--verify-sync", "maybe"], "--verify-sync takes no value, but 'maybe' follows"),
        (["--no-verify-sync", "1"], "--no-verify-sync takes no value"),
        (["--loss-type", "ppo"], "--loss-type is 'ppo'; it must be one of"),
        (["--max-steps"], "--max-steps takes one value, but has none"),
        (["--max-steps", "3", "4"], "--max-steps takes one value, but has 2 (3 4)"),
        (["--seed=1", "2"], "'2' belongs to no flag"),
        (["--seed="], "--seed is ''; it must be a whole number; 0 works"),
        (["train", "--seed", "1"], "'train' belongs to no flag"),
        (["--log-to", "wandb", "mlflow"], "--log-to is 'mlflow'; it must be one of wandb"),
        (["--dtype", "None"], "--dtype is 'None'; it must be one of"),
    ],
)
def test_a_value_of_another_kind_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        parse(words)
    assert "\n" not in str(refused.value)
    assert capsys.readouterr() == ("", "")


def test_a_value_of_another_kind_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("max_steps = 2.5\n")
    with pytest.raises(UserError, match=re.escape(f"{path}: --max-steps is '2.5'; it must be")):
        parse(["--config", str(path)])


@pytest.mark.parametrize("answer", ["-x", r"-\frac{3}{4}", "-3/4", "-3", "-", "-h(x)", "-config"])
def test_an_answer_may_begin_with_a_minus(answer: str) -> None:
    words = ["--question", "-x + 2 = 0?", "--answer", answer, "--dry-run", "--seed", "3"]
    config = parse(words)
    assert (config.question, config.answer) == ("-x + 2 = 0?", answer)
    assert (config.dry_run, config.seed) == (True, 3)


def test_negative_numbers_of_a_list_stay_apart() -> None:
    config = parse(["--reward", "math", "length", "--reward-weights", "1", "-0.5"])
    assert config.reward_weights == (1.0, -0.5)


def test_values_that_can_be_read_are_not_refused() -> None:
    words = ["--seed=3", "--tape-gib", "None", "--reward", "math", "format", "--max-grad-norm"]
    found = parse([*words, "inf", "--no-verify-sync", "--learning-rate", "1e-6", "--dry-run"])
    assert found.seed == 3 and found.tape_gib is None and found.reward == ("math", "format")
    assert found.max_grad_norm == float("inf") and found.dry_run and not found.verify_sync
