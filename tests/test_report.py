"""The report: right numbers, no network, nothing of a model's text that a browser would run."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import polymath_fast
from polymath_fast.errors import UserError
from polymath_fast.report import charts, write_report
from polymath_fast.report.completions import spread

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
        values["completions"] = 40
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


def test_curves_hold_the_values_of_the_metrics(tmp_path):
    page, _ = report(make_run(tmp_path))
    rows = [metrics(step) for step in range(1, 9)]
    for label, key in (
        ("reward", "reward/mean"),
        ("mean length", "completion/mean_length"),
        ("largest", "sampling/logprob_diff_max"),
        ("gradient norm", "policy/grad_norm"),
        ("generate", "time/generate"),
    ):
        assert page.series[label] == [[row["step"], pytest.approx(row[key])] for row in rows], label
    assert page.series["entropy"] == [[s, pytest.approx(1 / s, rel=1e-4)] for s in range(1, 9)]
    assert page.series["held"] == [[0, 0.075], [8, 0.375]]
    assert page.series["rest"] == [[s, pytest.approx(10 - 4 - 0.5 - 4.5)] for s in range(1, 9)]
    assert page.series["latest"] == [[s, s] for s in range(1, 9)] or "custom/thing" in page.text


def test_first_screen_says_what_the_sample_did(tmp_path):
    page, text = report(make_run(tmp_path))
    words = " ".join(page.text.split())
    last_four = sum(1 - 0.8**step for step in range(5, 9)) / 4
    assert "org/tiny" in words and "8 steps" in words
    assert f"0.20\u2192{last_four:.2f}first step, then mean of the last 4" in words
    assert "7.5%\u219237.5%" in words and "3/40 then 15/40" in words
    assert "404 tok/s" in words  # median of 401 ... 408 is 404.5, rounded half to even
    assert "1:20" in words and "peak 1.5 GiB" in words
    assert "What is 2+2?" in words and "answer 4" in words
    assert '<span class="special">&lt;|im_start|&gt;</span>' in text


def test_best_worst_and_random_of_each_step(tmp_path):
    page, text = report(make_run(tmp_path))
    views = re.split(r'<div class="step" data-step="(\d+)">', text)[1:]
    assert views[::2] == [str(step) for step in range(1, 9)]
    for step, view in zip(views[::2], views[1::2], strict=True):
        shown = re.findall(r"<b>(\w+)</b>.*?reward (\S+?)<.*?i(\d)</pre>", view, re.DOTALL)
        assert shown[:2] == [("best", "1", "1"), ("worst", "0", "3")], step
        assert shown[2][0] == "random"


def test_page_needs_nothing_else(tmp_path):
    page, text = report(make_run(tmp_path))
    assert not re.findall(r"""(?:src|href|srcset|action)\s*=|url\(|@import|https?://""", text)
    assert page.count("script") == page.count("style") == 1
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


def test_hostile_text_stays_text(tmp_path):
    run_dir = make_run(tmp_path / "evil <b>", text=EVIL)
    (run_dir / "config.toml").write_text(
        f"model = {json.dumps(EVIL[:150])}\nquestion = {json.dumps(EVIL[:150])}\n"
        f"{json.dumps('<script>x</script>')} = 1\n"
    )
    rows = (run_dir / "metrics.jsonl").read_text()
    evil_keys = {"step": 3, "<script>a": 1.0, "eval/<img src=x>/mean@1": 0.5}
    (run_dir / "metrics.jsonl").write_text(rows + json.dumps(evil_keys) + "\n")
    page, text = report(run_dir)
    assert page.count("script") == 1 and page.count("img") == 0
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b[31m" in page.text
    assert "document.title='owned'" in page.text


@pytest.mark.parametrize("size", [3000, 1_000_000])
def test_size_is_bounded(tmp_path, size):
    run_dir = make_run(tmp_path, steps=100)
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in range(101, 6001):
            file.write(json.dumps(metrics(step)) + "\n")
    with (run_dir / "completions.jsonl").open("a") as file:
        file.write(json.dumps(completion(6000, 0, 1.0, "&" * size)) + "\n")
    page, text = report(run_dir)
    assert len(text) < 700_000
    assert max(len(points) for points in page.series.values()) <= charts.MAX_POINTS
    assert page.count("article") <= 3 * 40
    steps = [step for step, _ in page.series["reward"]]
    assert steps[0] < 20 and steps[-1] > 5980


@pytest.mark.parametrize(
    "harm",
    [
        lambda d: (d / "config.toml").unlink(),
        lambda d: (d / "config.toml").write_text("model = "),
        lambda d: (d / "completions.jsonl").unlink(),
        lambda d: (d / "metrics.jsonl").write_text(""),
        lambda d: (d / "metrics.jsonl").write_text('{"step": 1}\n'),
        lambda d: (d / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n'),
        lambda d: (d / "metrics.jsonl").write_text('{"step": 1, "reward/mean": null}\n'),
        lambda d: (d / "metrics.jsonl").write_text('{"step": 1, "reward/mean": "x", "y": [1]}\n'),
        lambda d: (d / "metrics.jsonl").write_text(
            '{"step": 1, "a": 1e308}\n{"step": 2, "a": -1e308}'
        ),
        lambda d: (d / "metrics.jsonl").write_text(
            '{"step": 1, "reward/mean": 1' + "0" * 400 + "}"
        ),
        lambda d: (d / "completions.jsonl").write_text('{"step": 1}\n{"step": 2, "reward": "x"}\n'),
        lambda d: (d / "completions.jsonl").write_bytes(b'\xff\xfe\n{"step": 1, "comp'),
    ],
)
def test_run_in_progress_or_with_missing_pieces(tmp_path, harm):
    run_dir = make_run(tmp_path)
    harm(run_dir)
    page, _ = report(run_dir)
    assert page.count("main") == 1
    for chart in page.charts:
        for one in chart["series"]:
            assert all(math.isfinite(value) for _, value in one["points"])
    assert not re.search(r"\b(nan|inf)\b", json.dumps(page.charts) + page.text)


def test_torn_last_line_and_unfinished_run(tmp_path):
    run_dir = make_run(tmp_path, steps=5)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward/me')
    page, _ = report(run_dir)
    assert "step 5 of 8" in page.text
    assert page.series["reward"][-1][0] == 5


def test_command(tmp_path):
    def run(path: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "polymath_fast.report", str(path)]
        return subprocess.run(command, capture_output=True, text=True)

    good = run(make_run(tmp_path / "run"))
    assert (good.returncode, good.stdout.strip()) == (0, str(tmp_path / "run" / "report.html"))
    bad = run(tmp_path / "nowhere")
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("error: ") and "metrics.jsonl" in bad.stderr
    assert bad.stderr.count("\n") == 1


def test_no_run_folder_and_unwritable(tmp_path):
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        write_report(tmp_path)
    run_dir = make_run(tmp_path / "run")
    (run_dir / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html cannot be written"):
        write_report(run_dir)


def test_style_and_script_travel_with_the_package():
    root = Path(polymath_fast.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["polymath_fast"]
    packaged = {path for pattern in patterns for path in root.glob(pattern)}
    assert {root / "report" / "style.css", root / "report" / "script.js"} <= packaged


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 0.013, [0, 0.005, 0.01]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (40, 75, [40, 50, 60, 70]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_labels_are_short():
    values = (0, 0.5, 1 / 3, 0.00012, 12345.6, 1234.4, 1e-30, -0.25)
    assert [charts.label(value) for value in values] == [
        *("0", "0.5", "0.333", "1.2e-4", "1.2e4", "1,234", "1e-30", "-0.25"),
    ]


def test_spread_keeps_first_and_last():
    assert spread(list(range(10)), 20) == list(range(10))
    chosen = spread(list(range(1000)), 40)
    assert len(chosen) == 40 and chosen[0] == 0 and chosen[-1] == 999


@pytest.fixture(scope="module")
def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    return found


def dump_dom(browser: str, page: Path, profile: Path) -> str:
    """The document after its scripts ran."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    result = subprocess.run(
        [browser, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_browser_shows_the_last_step_and_runs_only_our_script(tmp_path, browser):
    run_dir = make_run(tmp_path / "run", text=EVIL)
    write_report(run_dir)
    dom = dump_dom(browser, run_dir / "report.html", tmp_path / "profile")
    page = Page(dom)
    title = re.search(r"<title>(.*?)</title>", dom)[1]
    assert title == "org/tiny - run"
    current = [a for _, a in page.tags if a.get("class") == "step current"]
    assert [a["data-step"] for a in current] == ["8"]
    assert re.search(r"<output>8</output>", dom)
    assert dom.count('class="cursor"') == len(page.charts) >= 7
    assert page.count("img") == 0


def test_browser_shows_values_under_the_pointer(tmp_path, browser):
    """A pointer over the middle of the reward curve; the page's policy is lifted for the probe."""
    run_dir = make_run(tmp_path / "run")
    text = write_report(run_dir).read_text(encoding="utf-8")
    probe = """<script>
    const box = document.querySelector("svg.chart").getBoundingClientRect();
    const at = { clientX: box.left + box.width - 12, clientY: box.top + 50 };
    document.querySelector("svg.chart").dispatchEvent(new PointerEvent("pointermove", at));
    const slider = document.querySelector("input");
    slider.value = 2;
    slider.dispatchEvent(new Event("input"));
    </script></body>"""
    probed = re.sub("<meta http-equiv[^>]*>", "", text).replace("</body>", probe)
    path = tmp_path / "probe.html"
    path.write_text(probed, encoding="utf-8")
    dom = dump_dom(browser, path, tmp_path / "profile")
    tip = re.search(r'<div id="tip"[^>]*>(.*?)</div></div>', dom)[1]
    assert "hidden" not in re.search(r'<div id="tip"[^>]*>', dom)[0]
    assert tip.startswith("step 8")
    assert f"reward  {1 - 0.8**8:.4f}"[:14] in tip
    assert dom.count('visibility="visible"') >= 7
    assert re.search(r"<output>3</output>", dom)
    assert re.search(r'class="step current" data-step="3"', dom)
