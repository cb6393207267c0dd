"""Puts a report's page together. Everything that comes from a file passes through `_text`."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import statistics
import time
from importlib import resources
from pathlib import Path
from typing import Any

import polymath_fast
from polymath_fast.folders import run_data
from polymath_fast.monitor.console import printable
from polymath_fast.monitor.status import duration
from polymath_fast.report import panels
from polymath_fast.report.completions import Completions, StepPicks

Rows = list[dict[str, Any]]
MAX_TEXT = 3000
_SPECIAL_TOKEN = re.compile(r"&lt;\|[\w-]{1,40}\|&gt;")


def render(run_dir: Path, config: dict[str, Any], rows: Rows, completions: Completions) -> str:
    """The whole page. `rows` are the merged metrics, `config` the flat settings or empty."""
    assets = resources.files("polymath_fast.report")
    style = assets.joinpath("style.css").read_text(encoding="utf-8")
    script = assets.joinpath("script.js").read_text(encoding="utf-8")
    # Should escaping ever miss something, the browser still runs no script but ours.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    model = str(config.get("model", "unknown model"))
    sections = [
        _header(run_dir, model, config, rows),
        _cards(rows),
        _sample(config, completions),
        panels.main_charts(rows),
        _completions(completions),
        panels.other_charts(rows),
        _settings(config),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(model)} - {_text(run_dir.name)}</title>\n<style>{style}</style></head>\n"
        f"<body><main>{''.join(sections)}</main>\n"
        f"<footer>polymath_fast {polymath_fast.__version__}, written "
        f"{time.strftime('%Y-%m-%d %H:%M')} from <code>{_text(str(run_dir))}</code></footer>\n"
        f"<script>{script}</script></body></html>\n"
    )


def _header(run_dir: Path, model: str, config: dict[str, Any], rows: Rows) -> str:
    step = rows[-1]["step"] if rows else 0
    total = config.get("max_steps")
    if not rows:
        status = "no steps yet"
    elif total is None or step >= total:
        status = f"{step:,} steps"
    else:
        status = f"step {step:,} of {total:,}"
    source = config.get("question") or config.get("dataset") or "shipped sample"
    return (
        f'<header><p class="eyebrow">one-sample run <b>{_text(run_dir.resolve().name)}</b>'
        f'<span class="pill">{status}</span></p><h1>{_text(model)}</h1>'
        f'<p class="lead">taught by {_text(str(source), 160)}</p></header>'
    )


def _cards(rows: Rows) -> str:
    cards = []
    if change := run_data.reward_change(rows):
        first, last, window = change
        note = (
            f"first step, then mean of the last {window}" if window > 1 else "first and last step"
        )
        cards.append(_card("Reward", _arrow(f"{first:.2f}", f"{last:.2f}"), note))
    for name, scores in run_data.held_out(rows).items():
        cards.append(_accuracy_card(name, scores))
    speeds = _values(rows, "throughput/completion_tokens_per_s")
    if speeds:
        value = f"{statistics.median(speeds):,.0f}<small> tok/s</small>"
        cards.append(_card("Speed", value, "completion tokens, median step"))
    times = _values(rows, "time/step")
    if times:
        note = f"{len(times):,} steps of {statistics.median(times):,.1f} s"
        memory = _values(rows, "memory/peak_gib")
        note += f", peak {max(memory):.1f} GiB" if memory else ""
        cards.append(_card("Time", duration(sum(times)), note))
    return f'<section class="cards">{"".join(cards)}</section>' if cards else ""


def _accuracy_card(name: str, scores: list[run_data.Accuracy]) -> str:
    first, last = scores[0], scores[-1]
    counts = f"{first.correct}/{first.total}"
    value = _percent(first.mean)
    if len(scores) > 1:
        counts += f" then {last.correct}/{last.total}"
        value = _arrow(value, _percent(last.mean))
    bars = "".join(
        f'<span class="{style}" style="left:{one.low:.1%};right:{1 - one.high:.1%}"></span>'
        f'<i class="{style}" style="left:{one.mean:.1%}"></i>'
        for style, one in (("before", first), ("after", last))[2 - min(len(scores), 2) :]
    )
    interval = f"95% interval {100 * last.low:.0f} to {last.high:.0%}"
    note = f'<span class="range">{bars}</span>{counts}, {interval}'
    return _card(f"Held-out {_text(name, 40)}", value, note)


def _card(title: str, value: str, note: str) -> str:
    return f'<div class="card"><h3>{title}</h3><p class="figure">{value}</p><p>{note}</p></div>'


def _arrow(first: str, last: str) -> str:
    return f'<span class="from">{first}</span><span class="to">&rarr;</span>{last}'


def _sample(config: dict[str, Any], completions: Completions) -> str:
    prompts = completions.prompts
    if not prompts and config.get("question"):
        prompts = [(str(config["question"]), None)]
    blocks = []
    for prompt, answer in prompts:
        if answer is None and len(prompts) == 1:
            answer = config.get("answer")
        text = _SPECIAL_TOKEN.sub(r'<span class="special">\g<0></span>', _text(prompt.strip()))
        right = (
            ""
            if answer is None
            else f'<p class="answer">answer <b>{_text(str(answer), 200)}</b></p>'
        )
        blocks.append(f'<div class="prompt"><pre>{text}</pre>{right}</div>')
    if not blocks:
        return ""
    title = "The sample" if len(blocks) == 1 else "Some of the samples"
    return f"<section><h2>{title}</h2>{''.join(blocks)}</section>"


def _completions(completions: Completions) -> str:
    steps = completions.steps
    if not steps:
        return ""
    views = "".join(_step_view(picks) for picks in steps)
    numbers = ",".join(str(picks.step) for picks in steps)
    return (
        '<section id="completions"><h2>What it wrote</h2>'
        f'<p class="browse" hidden><label>step <output></output>'
        f'<input type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" '
        f'data-steps="{numbers}" aria-label="step"></label></p>{views}</section>'
    )


def _step_view(picks: StepPicks) -> str:
    cells = []
    for title, row in (("best", picks.best), ("worst", picks.worst), ("random", picks.any)):
        if row is not None:
            cells.append(_completion(title, row))
    return (
        f'<div class="step" data-step="{picks.step}"><h3>step {picks.step:,}</h3>'
        f'<div class="three">{"".join(cells)}</div></div>'
    )


def _completion(title: str, row: dict[str, Any]) -> str:
    reward = run_data.number(row.get("reward"))
    shown = "excluded" if reward is None else f"{reward:.3g}"
    facts = [f"{row['length']:,} tokens"] if isinstance(row.get("length"), int) else []
    if row.get("finish_reason") == "length":
        facts.append("cut at the limit")
    if row.get("finish_reason") == "repetition":
        facts.append("cut for repeating itself")
    text = _text(str(row.get("completion", "")).strip(), MAX_TEXT)
    return (
        f'<article><p class="facts"><b>{title}</b><span class="pill">reward {shown}</span>'
        f"{', '.join(facts)}</p><pre>{text or '<i>empty</i>'}</pre></article>"
    )


def _settings(config: dict[str, Any]) -> str:
    if not config:
        return ""
    rows = "".join(
        f"<tr><th>{_text(key, 60)}</th><td>{_text(_setting(value), 400)}</td></tr>"
        for key, value in config.items()
    )
    return (
        f"<section><details><summary><h2>Settings</h2></summary>"
        f'<table class="settings">{rows}</table></details></section>'
    )


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _percent(share: float) -> str:
    """0.075 -> 7.5%, 0.4 -> 40%."""
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def _values(rows: Rows, key: str) -> list[float]:
    return [value for _, value in run_data.series(rows, key)]


def _text(text: str, limit: int = MAX_TEXT) -> str:
    """Escaped for HTML, control characters visible, at most about `limit` characters."""
    return html.escape(printable(text, limit))
