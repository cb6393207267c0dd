"""The main job on the real 135M model: it learns, and both engines carry it."""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import mean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polymath_fast.config.command_line import parse

pytestmark = pytest.mark.slow


def run(output_dir, *flags):
    words = [sys.executable, "-m", "polymath_fast.train", "--output-dir", str(output_dir), *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_one_sample_is_learnt_and_the_saved_model_knows_it(tmp_path):
    rows = run(tmp_path / "run", "--engine", "transformers", "--max-steps", "8", "--eval-dataset")
    rewards = [row["reward/mean"] for row in rows]
    assert rewards[0] < 0.5
    assert mean(rewards[-3:]) > rewards[0] + 0.4
    assert all(row["sampling/logprob_diff_mean"] < 0.03 for row in rows if "policy/kl" in row)
    assert (tmp_path / "run/report.html").is_file()
    folder = tmp_path / "run/checkpoints/step_000008"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = "A rectangle has a length of 24 and a width of 15. What is its area?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = model.generate(prompt, max_new_tokens=96, do_sample=False)[0, prompt.shape[1] :]
    assert "360" in tokenizer.decode(answer)


@pytest.mark.vllm
def test_vllm_carries_the_same_job(tmp_path):
    """Sampling and learning agree, on the first weights and after an update reached the engine."""
    reward = tmp_path / "reward.py"  # of which no draw gives all completions the same
    reward.write_text(
        "def brevity(completions, **_):\n    return [1 / (9 + len(c)) for c in completions]"
    )
    rows = run(
        tmp_path / "run",
        *("--engine", "vllm", "--max-steps", "3", "--eval-dataset"),
        *("--num-generations", "16", "--max-completion-length", "48", "--beta", "0.001"),
        *("--reward", f"{reward}:brevity"),
        *("--learning-rate", "5e-5", "--verify-sync"),  # so that bfloat16 moves enough to see it
    )
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sampling/logprob_diff_mean"] < 0.03 for row in rows)
    assert rows[0]["policy/kl"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["policy/kl"] > 1e-3
    assert all(row["time/verify"] > 0 for row in rows)
    versions = {
        json.loads(line)["weight_version"]
        for line in (tmp_path / "run/completions.jsonl").read_text().splitlines()
    }
    assert versions == {0, 1, 2}


def test_the_demo_is_what_the_readme_says():
    config = parse([])
    assert (config.model, config.dataset) == ("embedded:smollm2", "shipped:rectangle")
    assert config.num_generations * config.groups_per_step == 32
