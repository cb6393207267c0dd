"""The page of a report: no network, nothing of a model's text that a browser would run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from report_pages import EVIL, Page, completion, make_run, metrics, report

import polymath_fast
from polymath_fast.report import charts, write_report


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


def test_style_and_script_travel_with_the_package():
    root = Path(polymath_fast.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["polymath_fast"]
    packaged = {path for pattern in patterns for path in root.glob(pattern)}
    assert {root / "report" / "style.css", root / "report" / "script.js"} <= packaged


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
