"""Runs that never were, and what an HTML parser sees in their reports."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path

from polymath_fast.report import write_report

EVIL = (
    "</pre></article><script>document.title='owned'</script>"
    "<img src=x onerror=\"document.title='owned'\"><svg onload=document.title='owned'>"
    " javascript:alert(1) ' \" \x1b[31m \ud800 \u202e"
)


class Page(html.parser.HTMLParser):
    """The tags, the attributes, the text and the charts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.charts = [json.loads(a["data-chart"]) for _, a in self.tags if a.get("data-chart")]
        self.series = {one["label"]: one["points"] for c in self.charts for one in c["series"]}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def metrics(step: int) -> dict:
    return {
        "step": step,
        "reward/mean": round(1 - 0.8**step, 4),
        "reward/timeout_ratio": 0.0,
        "completion/mean_length": 60.0 + step,
        "completion/truncated_ratio": 0.125,
        "policy/entropy": 1 / step,
        "policy/kl": 0.0,
        "policy/grad_norm": 0.5,
        "sampling/logprob_diff_mean": 0.004,
        "sampling/logprob_diff_max": 0.2,
        **{"time/step": 10.0, "time/generate": 4.0, "time/score": 0.5, "time/learn": 4.5},
        "throughput/completion_tokens_per_s": 400.0 + step,
        "memory/peak_gib": 1.5,
        "custom/thing": float(step),
    }


def completion(step: int, index: int, reward: float | None, text: str) -> dict:
    return {
        **{"step": step, "group": 0, "index": index, "prompt": "<|im_start|>What is 2+2?"},
        **{"answer": "4", "completion": text, "reward": reward, "length": 9},
        "finish_reason": "stop",
    }


def make_run(run_dir: Path, steps: int = 8, text: str = "four") -> Path:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.toml").write_text('model = "org/tiny"\nmax_steps = 8\nreward = ["math"]\n')
    rows = [metrics(step) for step in range(1, steps + 1)]
    for step, correct in ((0, 3), (steps, 15)):
        values = {"mean@1": correct / 40, "low": 0.02, "high": 0.53, "correct": correct}
        values |= {"completions": 40, "pass@4": correct / 20}
        rows.append({"step": step, **{f"eval/held/{k}": v for k, v in values.items()}})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (run_dir / "completions.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            for index, reward in enumerate((0.5, 1.0, None, 0.0)):
                row = completion(step, index, reward, f"{text} s{step} i{index}")
                file.write(json.dumps(row) + "\n")
    return run_dir


def report(run_dir: Path) -> tuple[Page, str]:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = path.read_text(encoding="utf-8")
    return Page(text), text
