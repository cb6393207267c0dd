"""Bad settings: each gives one clear message with the value, the rule and a value that works."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from polymath_fast import train
from polymath_fast.config import Config
from polymath_fast.config.command_line import parse
from polymath_fast.errors import UserError
from polymath_fast.evaluation.settings import EvalSettings

HUGE = 10**30


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("--num-genrations", "--num-generations"),
        ("--num_genrations", "--num-generations"),
        ("--temprature", "--temperature"),
        ("--modle", "--model"),
        ("--confg", "--config"),
        ("--rollout.num-generations", "--num-generations"),
    ],
)
@pytest.mark.parametrize("form", ["{} 3", "{}=3"])
def test_a_typo_in_a_flag_names_the_nearest(typo: str, meant: str, form: str) -> None:
    with pytest.raises(UserError) as error:
        parse(form.format(typo).split())
    assert str(error.value) == f"unknown flag {typo}. Perhaps you meant {meant}"


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--resume auto", ["--resume auto", "--output-dir runs/first"]),
        ("--num-generations 0", ["--num-generations is 0", "at least 2", "8 works"]),
        ("--num-generations 1", ["--num-generations is 1", "at least 2"]),
        ("--num-generations 1 --scale-rewards batch", ["at least 2"]),
        ("--num-generations -1", ["--num-generations is -1"]),
        (f"--num-generations {HUGE}", ["at most"]),
        ("--num-train-generations 1", ["--num-train-generations is 1", "at least 2"]),
        (
            "--num-generations 8 --num-train-generations 9",
            ["--num-train-generations is 9", "at most --num-generations (8)", "2 works"],
        ),
        ("--oversample -0.1", ["--oversample is -0.1", "at least 0", "0.25 works"]),
        ("--oversample inf", ["--oversample is inf", "at most 16"]),
        (
            "--release-kv-cache --reuse-kv-cache",
            ["--reuse-kv-cache", "--release-kv-cache gives that memory away", "leave one"],
        ),
        ("--partial-rollouts", ["--partial-rollouts", "add --oversample 0.25"]),
        (
            "--partial-rollouts --oversample 0.5",
            ["older weights", "add --importance-sampling-mode token_truncate"],
        ),
        ("--stop-repetition 1", ["--stop-repetition is 1", "at least 2", "24 works"]),
        (
            "--stop-repetition 65 --max-completion-length 64",
            ["--stop-repetition is 65", "--max-completion-length (64)", "16 works"],
        ),
        ("--repetition-period 4", ["nothing reads without --stop-repetition"]),
        ("--temperature 0", ["--temperature is 0.0", "at least 0.01", "1 works"]),
        ("--temperature -0.5", ["--temperature is -0.5"]),
        ("--temperature nan", ["--temperature is nan", "at least 0.01"]),
        ("--temperature inf", ["at most 10"]),
        ("--temperature 1e9", ["at most 10"]),
        ("--learning-rate -1e-6", ["--learning-rate is -1e-06", "at least 0", "1e-06 works"]),
        ("--learning-rate nan", ["--learning-rate is nan"]),
        ("--learning-rate inf", ["--learning-rate is inf"]),
        ("--max-steps 0", ["--max-steps is 0", "at least 1"]),
        ("--groups-per-step -3", ["--groups-per-step is -3"]),
        ("--max-completion-length 0", ["--max-completion-length is 0"]),
        ("--updates-per-batch 0", ["--updates-per-batch is 0"]),
        ("--keep-checkpoints 0", ["--keep-checkpoints is 0"]),
        ("--max-samples 0", ["--max-samples is 0"]),
        ("--save-every -1", ["--save-every is -1", "at least 0"]),
        ("--eval-every -1", ["--eval-every is -1"]),
        (f"--seed {HUGE}", ["--seed is 1000", "at most 4294967295"]),
        ("--seed -1", ["--seed is -1"]),
        (f"--max-steps {HUGE}", ["at most 2147483647"]),
        ("--epsilon 0", ["--epsilon is 0.0", "greater than 0", "0.2 works"]),
        ("--epsilon 1", ["less than 1"]),
        ("--epsilon nan", ["--epsilon is nan"]),
        ("--epsilon-high -0.1", ["--epsilon-high is -0.1"]),
        ("--delta 1", ["--delta is 1.0", "greater than 1", "4 works"]),
        ("--loss-type cispo", ["needs --epsilon-high", "5.0 works"]),
        ("--loss-type sapo --epsilon 0.1", ["--epsilon is 0.1", "sapo does not read"]),
        ("--loss-type reinforce --delta 9", ["--delta is 9.0", "reinforce does not read"]),
        (
            "--importance-sampling-clip-max 2",
            ["--importance-sampling-clip-max is 2.0", "add --importance-sampling-mode"],
        ),
        (
            "--importance-sampling-mode token_mask --importance-sampling-clip-max inf",
            ["token_mask needs a bound", "--importance-sampling-clip-max 3 works"],
        ),
        (
            "--importance-sampling-mode token_mask --importance-sampling-clip-min 3",
            ["--importance-sampling-clip-min is 3", "less than", "0.5 works"],
        ),
        (
            "--importance-sampling-mode sequence_mask --loss-type vespo",
            ["vespo takes weights of tokens", "token_truncate works"],
        ),
        ("--max-resamples 9", ["--max-resamples is 9", "--on-saturation resample"]),
        (
            "--on-saturation entropy --saturation-entropy-coef 0",
            ["--saturation-entropy-coef is 0", "0.001 works"],
        ),
        (
            "--on-saturation entropy --entropy-coef 0.01",
            ["no effect with --entropy-coef 0.01", "leave one of them out"],
        ),
        ("--beta -0.1", ["--beta is -0.1"]),
        ("--max-grad-norm 0", ["--max-grad-norm is 0.0"]),
        ("--adam-beta1 1", ["--adam-beta1 is 1.0", "less than 1"]),
        ("--reward-timeout 0", ["--reward-timeout is 0.0"]),
        ("--eval-temperature nan", ["--eval-temperature is nan"]),
        ("--eval-temperature 0.001", ["0 (greedy)"]),
        ("--eval-k 8", ["--eval-k is 8", "greedy", "--eval-temperature 0.6"]),
        ("--dataset-split test --dataset my.jsonl", ["test", "files", "leave it out"]),
        ("--dataset-split test --dataset shipped:rectangle", ["test", "leave it out"]),
        ("--tokens-per-microbatch 95", ["95", "--max-completion-length (96)", "16384 works"]),
        ("--warmup-steps 20", ["--warmup-steps is 20 of 20", "0 works"]),
        ("--reward math format --reward-weights 1", ["1 values for 2", "--reward-weights 1.0 1.0"]),
        ("--reward-weights nan", ["finite"]),
        ("--reward-weights 0", ["not all zero"]),
        ("--reward", ["--reward is empty", "--reward math"]),
        ("--question 6*7?", ["--question needs the right answer"]),
        ("--answer 42", ["there is no question", "--question"]),
        ("--question 6*7? --answer 42 --dataset a.jsonl", ["both given"]),
        ("--threads 0", ["--threads is 0"]),
        ("--kv-cache-gib 0", ["--kv-cache-gib is 0.0"]),
        ("--kl-estimator k1", ["--kl-estimator is k1", "--beta 0.001"]),
        ("--output-dir=", ["--output-dir is ''"]),
        ("--model=", ["--model is ''"]),
    ],
)
def test_a_setting_that_cannot_work(flags: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(flags.split(" "))
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_a_cache_that_the_engine_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "random:tiny", "--engine", "transformers", "--kv-cache-gib", "2.5"]
    assert train.main([*flags, "--dry-run"]) == 2
    assert "error: --kv-cache-gib 2.5 is for vLLM" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x" * 5000, "loop/file.jsonl", "~nobody-of-that-name/file.jsonl"])
@pytest.mark.parametrize(
    "flag", ["--model", "--dataset", "--eval-dataset", "--reward", "--resume", "--config"]
)
def test_a_name_that_the_system_refuses_to_look_for(
    flag: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(UserError, match=f"^{flag} '{name[:20]}.* cannot be looked for") as error:
        parse([flag, name])
    assert len(str(error.value)) < 300
    other = {"--model": "model", "--dataset": "dataset", "--resume": "result_path"}.get(flag)
    if other is not None:
        settings = EvalSettings(**{other: (name,) if other == "dataset" else name})
        with pytest.raises(UserError, match="cannot be looked for"):
            settings.check()


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question(question: str) -> None:
    with pytest.raises(UserError, match="--question is empty"):
        Config(question=question, answer="1")
    with pytest.raises(UserError, match="right answer"):
        Config(question="1?", answer=question)


@pytest.mark.parametrize(
    "values",
    [
        {"num_generations": "8"},
        {"num_generations": True},
        {"temperature": [1.0]},
        {"template": "chta"},
        {"loss_type": "ppo"},
        {"log_to": ("wandbb",)},
    ],
)
def test_wrong_types_are_also_refused_from_python(values: dict) -> None:
    with pytest.raises(UserError):
        Config(**values)


def test_values_at_the_edge_of_a_range_are_allowed() -> None:
    assert Config(max_grad_norm=math.inf, learning_rate=0.0).max_grad_norm == math.inf
    assert Config(save_every=0, eval_every=0, log_completions_every=0).save_every == 0
    assert parse(["--learning-rate", "0"]).learning_rate == 0


def test_a_token_is_never_written_to_disk_nor_shown() -> None:
    token = "hf_" + "a" * 34
    for values in ({"model": f"https://user:{token}@host/x"}, {"revision": token}):
        with pytest.raises(UserError, match="HF_TOKEN") as error:
            Config(**values)
        assert token not in str(error.value)


def test_text_that_is_no_text() -> None:
    with pytest.raises(UserError, match="not valid UTF-8"):
        Config(question="\udcff?", answer="1")
    with pytest.raises(UserError, match="--output-dir"):
        Config(output_dir="a\0b")


def test_values_that_begin_with_a_hyphen_are_values() -> None:
    assert parse(["--question", "-1 - 1 = ?", "--answer", "-2"]).answer == "-2"


def test_a_wrong_type_ends_the_process_with_code_2_and_writes_nothing(tmp_path: Path) -> None:
    code = "from polymath_fast.train import main; raise SystemExit(main(['--seed', 'x']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: --seed is 'x'; it must be a whole number; 0 works\n"
    assert not list(tmp_path.iterdir())
