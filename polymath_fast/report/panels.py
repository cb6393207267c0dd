"""Which metrics a report draws, under which title, with which words on how to read them."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

from polymath_fast.folders import run_data
from polymath_fast.report import charts
from polymath_fast.report.charts import Series

Rows = list[dict[str, Any]]
PHASES = ("generate", "score", "learn", "sync")
MAX_OTHERS = 40
_MISMATCH = {"mean": "sampling/logprob_diff_mean", "largest": "sampling/logprob_diff_max"}

# (title, how to read it, ((key, legend), ...))
_CURVES = (
    (
        "Completion length",
        "tokens; growth that ends at the limit means cut answers",
        (("completion/mean_length", "mean length"),),
    ),
    (
        "Entropy",
        "nats per token; near 0 the completions of a group are all alike",
        (("policy/entropy", "entropy"),),
    ),
    (
        "Gradient norm",
        "before clipping; spikes ask for a lower learning rate",
        (("policy/grad_norm", "gradient norm"),),
    ),
    (
        "Cut and distinct completions",
        "share of the batch",
        (
            ("completion/truncated_ratio", "cut at the limit"),
            ("completion/distinct_ratio", "distinct"),
        ),
    ),
    (
        "Divergence and clipping",
        "KL from the starting model, or without beta from the policy that sampled; share of tokens "
        "whose ratio was clipped",
        (("policy/kl", "KL"), ("policy/clip_ratio", "clipped")),
    ),
)


def main_charts(rows: Rows) -> str:
    """The section of curves that every run is judged by; those without data are left out."""
    first, *others = (_curves(rows, *spec) for spec in _CURVES)
    panels = [_reward(rows), _held_out(rows), first, _phases(rows), _mismatch(rows), *others]
    found = "".join(panel for panel in panels if panel)
    return (
        f'<section><h2>How it went</h2><div class="charts">{found}</div></section>' if found else ""
    )


def other_charts(rows: Rows) -> str:
    """Every remaining metric: a curve when it moves, a row of a table when it does not."""
    keys = sorted({key for row in rows for key in row} - _shown() - {"step"})
    moving, still = [], []
    for key in keys:
        points = run_data.series(rows, key)
        if not points or run_data.is_held_out(key):
            continue
        if len({value for _, value in points}) > 1:
            moving.append((key, points))
        else:
            still.append((key, points[0][1]))
    if not moving and not still:
        return ""
    panels = "".join(
        _panel(key, "", [Series("latest", points)]) for key, points in moving[:MAX_OTHERS]
    )
    table = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{charts.label(value)}</td></tr>"
        for key, value in still[:MAX_OTHERS]
    )
    constants = f'<table class="settings">{table}</table>' if table else ""
    return (
        f"<section><details><summary><h2>Every other metric</h2></summary>"
        f'<div class="charts">{panels}</div>{constants}</details></section>'
    )


def _shown() -> set[str]:
    curves = {key for _, _, keys in _CURVES for key, _ in keys}
    phases = {f"time/{name}" for name in (*PHASES, "step")}
    return curves | phases | {"reward/mean", *_MISMATCH.values()}


def _reward(rows: Rows) -> str:
    points = run_data.series(rows, "reward/mean")
    inside = all(0 <= value <= 1 for _, value in points)
    return _panel(
        "Reward",
        "mean over the completions of a step",
        [Series("reward", points)],
        lambda series: charts.lines(series, fixed=(0.0, 1.0) if inside else None),
    )


def _held_out(rows: Rows) -> str:
    series = []
    for index, (name, scores) in enumerate(run_data.held_out(rows).items()):
        points = [(one.step, one.mean) for one in scores]
        edges = [(one.step, one.low, one.high) for one in scores]
        series.append(Series(name, points, index % 5 + 1, edges))
    return _panel(
        "Held-out accuracy",
        "problems that were never trained on, with 95 % intervals",
        series,
        lambda found: charts.lines(found, fixed=(0.0, 1.0)),
    )


def _mismatch(rows: Rows) -> str:
    series = [
        Series(legend, run_data.series(rows, key), color)
        for color, (legend, key) in enumerate(_MISMATCH.items(), start=1)
    ]
    return _panel(
        "Sampler against learner",
        "difference of log-probs for the same tokens; should stay small and flat",
        series,
        lambda found: charts.lines(found, log=True),
    )


def _curves(rows: Rows, title: str, hint: str, keys: tuple[tuple[str, str], ...]) -> str:
    series = [
        Series(legend, run_data.series(rows, key), color)
        for color, (key, legend) in enumerate(keys, start=1)
    ]
    if all(value == 0 for one in series for _, value in one.points):
        return ""
    fixed = (0.0, 1.0) if all(key.endswith("_ratio") for key, _ in keys) else None
    return _panel(title, hint, series, lambda found: charts.lines(found, fixed=fixed))


def _phases(rows: Rows) -> str:
    found = {name: run_data.series(rows, f"time/{name}") for name in PHASES}
    named = [dict(points) for points in found.values()]
    rest = [
        (step, max(value - sum(phase.get(step, 0.0) for phase in named), 0.0))
        for step, value in run_data.series(rows, "time/step")
    ]
    found["rest"] = rest
    series = [Series(name, points, color) for color, (name, points) in enumerate(found.items(), 1)]
    return _panel("Time per step", "seconds, by phase", series, charts.stacked)


def _panel(
    title: str,
    hint: str,
    series: list[Series],
    draw: Callable[[list[Series]], str] = charts.lines,
) -> str:
    """A figure: title, legend with the latest values, and the chart; empty without points."""
    series = [one for one in series if one.points]
    if not series:
        return ""
    legend = "".join(
        f'<span><i class="b{one.color}"></i>{html.escape(one.label)} '
        f"<b>{charts.label(one.points[-1][1])}</b></span>"
        for one in series
    )
    note = f'<p class="hint">{hint}</p>' if hint else ""
    return (
        f"<figure><figcaption><h3>{html.escape(title)}</h3>{note}"
        f'<p class="legend">{legend}</p></figcaption>{draw(series)}</figure>'
    )
