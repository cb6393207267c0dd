"""Line charts and stacked bars as inline SVG.

Colours come from the page's style (classes c1 to c5), so a chart follows light and dark. The points
also travel in a data attribute: script.js shows their values under the pointer.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

Points = list[tuple[int, float]]

WIDTH, HEIGHT = 560, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
MAX_POINTS = 400
MAX_BARS = 100
# From this many points on, single noisy ones are faint and their moving average is drawn.
SMOOTH_FROM = 60


@dataclass(frozen=True)
class Series:
    """One curve: (step, value) points in ascending steps, and intervals to draw around them."""

    label: str
    points: Points
    color: int = 1
    intervals: list[tuple[int, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Scale:
    """Maps steps and values to the pixels of a chart."""

    steps: tuple[float, float]
    values: tuple[float, float]
    log: bool = False

    def x(self, step: float) -> float:
        low, high = self.steps
        return LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.values
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)


def lines(
    series: Sequence[Series], *, fixed: tuple[float, float] | None = None, log: bool = False
) -> str:
    """An SVG of curves over steps. `fixed` is the range of values to show; without it the range
    follows the data. `log` asks for decades, which needs values above 0."""
    series = [thin(one) for one in series if one.points]
    values = [value for one in series for _, value in one.points]
    values += [edge for one in series for _, low, high in one.intervals for edge in (low, high)]
    log = log and min(values) > 0
    scale = Scale(_step_range(series), _value_range(values, fixed, log), log)
    return _svg(scale, series, "".join(_curve(scale, one) for one in series))


def stacked(series: Sequence[Series]) -> str:
    """An SVG of bars, one a step or one a bucket of steps, the series on top of each other."""
    series = [one for one in series if one.points]
    steps = sorted({step for one in series for step, _ in one.points})
    size = math.ceil(len(steps) / MAX_BARS)
    buckets = [steps[start : start + size] for start in range(0, len(steps), size)]
    means = [_bucketed(one, buckets) for one in series]
    tops = [sum(one.points[index][1] for one in means) for index in range(len(buckets))]
    low, high = _step_range(means)
    half = (high - low) / max(len(buckets) - 1, 1) / 2
    scale = Scale((low - half, high + half), (0.0, _nice_above(max(tops))))
    width = max((WIDTH - LEFT - RIGHT) / len(buckets) * 0.82, 1.0)
    drawn = []
    base = [0.0] * len(buckets)
    for one in means:
        for index, (step, value) in enumerate(one.points):
            top = scale.y(base[index] + value)
            height = scale.y(base[index]) - top
            drawn.append(
                f'<rect class="c{one.color}" x="{scale.x(step) - width / 2:.1f}" y="{top:.1f}" '
                f'width="{width:.1f}" height="{height:.1f}"/>'
            )
            base[index] += value
    return _svg(scale, means, f'<g class="bars">{"".join(drawn)}</g>')


def thin(one: Series) -> Series:
    """At most MAX_POINTS points: neighbours are replaced by their mean."""
    if len(one.points) <= MAX_POINTS:
        return one
    size = math.ceil(len(one.points) / MAX_POINTS)
    steps = [step for step, _ in one.points]
    buckets = [steps[start : start + size] for start in range(0, len(steps), size)]
    return _bucketed(one, buckets)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between `low` and `high`, about `count` of them."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def label(value: float) -> str:
    """A number in at most about five characters."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 0.001:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _bucketed(one: Series, buckets: list[list[int]]) -> Series:
    """One point a bucket of steps: the mean of those that have a value, 0 when none has."""
    values = dict(one.points)
    points = []
    for bucket in buckets:
        found = [values[step] for step in bucket if step in values]
        points.append((bucket[len(bucket) // 2], sum(found) / len(found) if found else 0.0))
    return replace(one, points=points)


def _step_range(series: Sequence[Series]) -> tuple[float, float]:
    steps = [step for one in series for step, _ in one.points]
    low, high = min(steps), max(steps)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _value_range(
    values: list[float], fixed: tuple[float, float] | None, log: bool
) -> tuple[float, float]:
    if fixed is not None:
        return fixed
    low, high = min(values), max(values)
    if log:
        bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return 10.0**bottom, 10.0 ** max(top, bottom + 1)
    if high == low:
        high = low + (abs(low) or 1.0) * 0.3
        low = min(low, 0.0)
    if 0 < low < 0.6 * high:
        low = 0.0
    margin = (high - low) * 0.06
    return (low - margin if low != 0 else 0.0), high + margin


def _nice_above(value: float) -> float:
    return value * 1.06 if value > 0 else 1.0


def _svg(scale: Scale, series: Sequence[Series], drawing: str) -> str:
    data = {
        "box": [WIDTH, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
        "steps": scale.steps,
        "series": [
            {
                "label": one.label,
                "color": one.color,
                "points": [[step, float(f"{value:.5g}")] for step, value in one.points],
            }
            for one in series
        ],
    }
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'data-chart="{html.escape(json.dumps(data, separators=(",", ":")))}">'
        f"{_axes(scale)}{drawing}</svg>"
    )


def _axes(scale: Scale) -> str:
    parts = []
    for value in _value_ticks(scale):
        y = scale.y(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{label(value)}</text>"
        )
    for step in ticks(*scale.steps, count=6):
        if step == int(step):
            parts.append(
                f'<text class="tick" x="{scale.x(step):.1f}" y="{HEIGHT - BOTTOM + 17}" '
                f'text-anchor="middle">{step:,.0f}</text>'
            )
    return "".join(parts)


def _value_ticks(scale: Scale) -> list[float]:
    if not scale.log:
        return ticks(*scale.values)
    low, high = (round(math.log10(edge)) for edge in scale.values)
    stride = math.ceil((high - low + 1) / 6)
    return [10.0**power for power in range(low, high + 1, stride)]


def _curve(scale: Scale, one: Series) -> str:
    parts = []
    for step, low, high in one.intervals:
        x = scale.x(step)
        parts.append(
            f'<line class="interval s{one.color}" x1="{x:.1f}" x2="{x:.1f}" '
            f'y1="{scale.y(low):.1f}" y2="{scale.y(high):.1f}"/>'
        )
    noisy = len(one.points) >= SMOOTH_FROM and not one.intervals
    parts.append(_path(scale, one.points, f"line s{one.color}" + (" faint" if noisy else "")))
    if noisy:
        parts.append(_path(scale, _moving_average(one.points), f"line s{one.color}"))
    if len(one.points) <= 30:
        dots = ((scale.x(step), scale.y(value)) for step, value in one.points)
        parts += [
            f'<circle class="c{one.color}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in dots
        ]
    return "".join(parts)


def _path(scale: Scale, points: Points, style: str) -> str:
    spots = " L".join(f"{scale.x(step):.1f} {scale.y(value):.1f}" for step, value in points)
    return f'<path class="{style}" d="M{spots}"/>'


def _moving_average(points: Points) -> Points:
    reach = max(len(points) // 40, 2)
    averaged = []
    for index, (step, _) in enumerate(points):
        near = points[max(index - reach, 0) : index + reach + 1]
        averaged.append((step, sum(value for _, value in near) / len(near)))
    return averaged
