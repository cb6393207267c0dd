"""What the documents say is there: flags, links, metrics; the manual's code runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from polymath_fast import train
from polymath_fast.config import Config
from polymath_fast.evaluation.settings import EvalSettings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "AGENTS.md", *ROOT.glob("docs/*.md")]
# of pip, Chromium, benchmarks.gpu_suite and a stylesheet's reader
OTHERS = {"--no-deps", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"} | {
    *("--user-data-dir", "--window-size", "--screenshot", "--force-dark-mode", "--only", "--help"),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_links_exist(page: Path) -> None:
    text = page.read_text()
    names = {*Config.__dataclass_fields__, *EvalSettings.__dataclass_fields__, "config"}
    known = {"--" + name.replace("_", "-") for name in names} | OTHERS
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))
    assert {flag for flag in found if flag.replace("--no-", "--") not in known} <= OTHERS
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if not target.startswith("http"):
            file = page.parent / path if path else page
            assert file.exists(), target
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.M) if heading else []
            slugs = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in titles}
            assert not heading or heading in slugs, target


@pytest.mark.parametrize("page", ["README.md", "docs/operators.md"])
def test_code_blocks_run(page: str) -> None:
    tokens, states, vocabulary, size = 24, 32, 97, 120
    flat, logprobs = torch.randn(size), -torch.rand(tokens)
    names = {
        "hidden": torch.randn(tokens, states, requires_grad=True),
        "head_weight": torch.randn(vocabulary, states, requires_grad=True),
        "lm_head": torch.nn.Linear(states, vocabulary, bias=False),
        "logits": torch.randn(tokens, vocabulary, requires_grad=True),
        "targets": torch.randint(vocabulary, (tokens,)),
        **{"rewards": torch.rand(4), "advantages": torch.randn(4)},
        "cu_seqlens": torch.tensor([0, 6, 6, 18, 24], dtype=torch.int32),
        **{"old_logprobs": logprobs, "sampling_logprobs": logprobs + 0.1},
        **{name: torch.randn(29, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))},
        "prompt_len": 5,
        **{"live": flat.bfloat16(), "master": flat.bfloat16().float(), "grad": torch.randn(size)},
        **{"exp_avg": torch.zeros(size), "exp_avg_sq": torch.zeros(size), "step": torch.tensor(1)},
        **{"sources": [torch.randn(4, 5)], "destinations": [torch.zeros(4, 5)]},
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(block.replace('"cuda"', '"cpu"'), names)
    assert names["out"].loss.isfinite()


def test_metrics_that_a_run_writes_are_explained(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def reward(completions, **columns):\n    return [float(len(c) % 5) for c in completions]\n"
    )
    (tmp_path / "mine.jsonl").write_text('{"problem": "1+1?", "answer": 2}')
    words = [
        *("--model", "random:tiny", "--max-steps", "1", "--num-generations", "4"),
        *("--groups-per-step", "1", "--max-completion-length", "8", "--updates-per-batch", "2"),
        *("--reward", f"{tmp_path}/mine.py:reward", "length", "--beta", "0.1", "--verify-sync"),
        *("--importance-sampling-mode", "token_mask", "--stop-repetition", "2", "--speculate", "2"),
        *("--oversample", "0.5", "--partial-rollouts", "--active-vocabulary", "auto"),
        *("--eval-dataset", f"{tmp_path}/mine.jsonl", "--eval-k", "2"),
        *("--eval-temperature", "0.6", "--engine", "transformers"),
        *("--output-dir", str(tmp_path / "run")),
    ]
    assert train.main(words) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    written = {key for line in lines for key in json.loads(line)} - {"step"}
    assert len(written) > 50
    table = re.findall(r"^\| (`.+?`) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    named = {name for cell in table for name in re.findall(r"`([^`]+)`", cell)}
    for key in written:
        general = re.sub(r"(?<=eval/)mine|(?<=reward/)(mine.py:reward|length)$", "NAME", key)
        assert re.sub(r"@2$", "@K", general) in named, key
