"""Charts of the page as inline SVG: lines with error bars, and points of two measures. Colours are the page's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

_WIDTH, _HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 12, 38
_TICKS = 4


@dataclass(frozen=True)
class Point:
    """A point of a line chart, with its label and spread."""

    x: float
    y: float
    error: float = math.nan
    """Standard error of y; NaN: none is drawn"""
    kind: str = ""
    """CSS class: a verdict, with spaces as dashes"""
    title: str = ""
    """Text that is shown beside the pointer"""
    is_best: bool = False


@dataclass(frozen=True)
class Line:
    """A named line of a line chart."""

    name: str
    points: Sequence[Point]
    shade: int = 0
    """Place in the page's shades of a line, 0 to 4"""


@dataclass(frozen=True)
class Axis:
    """An axis: its label, and the values at its ends."""

    label: str
    low: float
    high: float

    @classmethod
    def around(cls, label: str, values: Sequence[float]) -> "Axis":
        """Return an axis that holds all values, with a margin."""
        known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(known), max(known)
        margin = (high - low) * 0.08 or abs(high) * 0.1 or 0.5
        return cls(label, low - margin, high + margin)

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return a few round values within the axis."""
        rough = (self.high - self.low) / _TICKS
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
        first = math.ceil(self.low / step)
        return [place * step for place in range(first, math.floor(self.high / step) + 1)]


def line_chart(title: str, x: Axis, y: Axis, lines: Sequence[Line], zero: float = math.nan) -> Markup:
    """Return a chart of lines with error bars; `zero` is the value of the base alone."""
    parts = [_frame(x, y)]
    if math.isfinite(zero):
        parts.append(_level(y, zero, "base alone"))
    for line in lines:
        known = [point for point in line.points if math.isfinite(point.y)]
        places = " ".join(f"{_x(x, point.x):.1f},{_y(y, point.y):.1f}" for point in known)
        parts.append(Markup('<polyline class="line shade{}" points="{}"/>').format(line.shade, places))
        parts += [_marked(x, y, point, f"shade{line.shade}") for point in known]
    return _svg(title, parts)


def scatter_chart(title: str, x: Axis, y: Axis, points: Sequence[Point], front: Sequence[Point]) -> Markup:
    """Return a chart of points by verdict, with a line along the Pareto front."""
    parts = [_frame(x, y)]
    places = " ".join(f"{_x(x, point.x):.1f},{_y(y, point.y):.1f}" for point in front)
    parts.append(Markup('<polyline class="front" points="{}"/>').format(places))
    parts += [_marked(x, y, point, "") for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    return _svg(title, parts)


def _svg(title: str, parts: Sequence[Markup]) -> Markup:
    start = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _HEIGHT, title)
    return start + Markup("").join(parts) + Markup("</svg>")


def _frame(x: Axis, y: Axis) -> Markup:
    """Return grid, ticks and labels of both axes."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in y.ticks():
        level = _y(y, value)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(_LEFT, right, level, level)
        )
        parts.append(
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{:g}</text>').format(
                _LEFT - 6, level + 4, _round(value)
            )
        )
    for value in x.ticks():
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{:g}</text>').format(
                _x(x, value), bottom + 15, _round(value)
            )
        )
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, right, bottom, bottom))
    middle = (_LEFT + right) / 2
    parts.append(
        Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(middle, _HEIGHT - 5, x.label)
    )
    half = (_TOP + bottom) / 2
    turned = Markup('<text class="label" x="12" y="{}" text-anchor="middle" transform="rotate(-90 12 {})">{}</text>')
    parts.append(turned.format(half, half, y.label))
    return Markup("").join(parts)


def _level(y: Axis, value: float, label: str) -> Markup:
    level, right = _y(y, value), _WIDTH - _RIGHT
    return Markup('<line class="zero" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
        _LEFT, right, level, level
    ) + Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(right, level - 4, label)


def _marked(x: Axis, y: Axis, point: Point, kind: str) -> Markup:
    """Return the marker of a point: a circle, or for verdicts the shape that the page's legend has."""
    across, down = _x(x, point.x), _y(y, point.y)
    parts = []
    if math.isfinite(point.error):
        low, high = _y(y, point.y - point.error), _y(y, point.y + point.error)
        parts.append(
            Markup('<line class="error {}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
                kind, across, across, low, high
            )
        )
    if point.is_best:
        parts.append(Markup('<circle class="best" cx="{:.1f}" cy="{:.1f}" r="9"/>').format(across, down))
    shapes = {
        "too-little": Markup('<rect class="point too-little" x="{0:.1f}" y="{1:.1f}" width="8" height="8"/>').format(
            across - 4, down - 4
        ),
        "overcooked": Markup('<path class="point overcooked" d="M{:.1f} {:.1f}l5 9h-10z"/>').format(across, down - 6),
    }
    circle = Markup('<circle class="point {}" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(point.kind or kind, across, down)
    parts.append(shapes.get(point.kind, circle))
    return Markup("<g><title>{}</title>{}</g>").format(point.title, Markup("").join(parts))


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.share(value) * (_HEIGHT - _BOTTOM - _TOP)


def _round(value: float) -> float:
    return round(value, 10) + 0.0
