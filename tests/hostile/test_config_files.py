"""Bad config files: each gives one clear message with the file and the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from polymath_fast.config.command_line import parse
from polymath_fast.errors import UserError


def refusal(text: str, tmp_path: Path) -> str:
    """What is said of a file that holds `text`; it names the file."""
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse(["--config", str(file)])
    assert str(file) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "num_genrations = 3",
        "[rollout]\nnum_genrations = 3",
        "[a.b.c]\nnum_genrations = 3",
        "rollout = { num_genrations = 3 }",
        "[[groups]]\nnum_genrations = 3",
    ],
)
def test_a_typo_in_a_file_names_the_nearest_and_the_file(text: str, tmp_path: Path) -> None:
    said = refusal(text, tmp_path)
    if "[[" not in text:
        assert "num_genrations" in said
        assert "Perhaps you meant --num-generations" in said


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[rollout]\nnum_generations = 3", "not nested"),
        ("seed = 1\nseed = 2", "not valid TOML"),
        ("a = 1\nseed = ", "not valid TOML"),
        ("seed = true", "seed is True"),
        ("dry_run = 'yes'", "dry_run is 'yes'"),
        ("dry_run = 1", "true or false"),
        ("seed = 2024-01-01", "seed holds"),
        ("reward = ['math', ['format']]", "reward holds"),
        ("reward = ['--seed']", "cannot begin with '--'"),
        ("seed = { a = 1 }", "seed holds"),
        ("seed = [1]", "single value"),
        ("config = 'cpu_demo'", "unknown key 'config'"),
        ("help = true", "unknown key 'help'"),
    ],
)
def test_a_bad_file_is_named(text: str, part: str, tmp_path: Path) -> None:
    assert part in refusal(text, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "num_generations = 'x'",
        "num_generations = 4.5",
        "loss_type = 'dapoo'",
        "reward_weights = ['x']",
    ],
)
def test_a_wrong_type_in_a_file_is_refused_with_its_name(text: str, tmp_path: Path) -> None:
    said = refusal(text, tmp_path)
    assert "must be" in said
    assert "--" + text.split(" ")[0].replace("_", "-") in said


def test_a_file_may_begin_with_a_byte_order_mark_and_end_lines_like_windows(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(b"\xef\xbb\xbfseed = 3\r\nmax_steps = 4\r\n")
    settings = parse(["--config", str(file)])
    assert (settings.seed, settings.max_steps) == (3, 4)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"output_dir = 'caf\xe9'")
    with pytest.raises(UserError, match="UTF-8"):
        parse(["--config", str(latin)])
    with pytest.raises(UserError, match="perhaps you meant cpu_demo"):
        parse(["--config", "cpu_dmo"])
    with pytest.raises(UserError, match="neither a file nor a preset"):
        parse(["--config", str(tmp_path)])
    with pytest.raises(UserError, match="neither a file nor a preset"):
        parse(["--config", "../presets/cpu_demo"])
