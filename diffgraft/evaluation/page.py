"""The page of an evaluation: one HTML file that needs no network, for phones and screens, light and dark."""

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffgraft.evaluation.charts import Axis, Line, Point, line_chart, scatter_chart
from diffgraft.evaluation.evaluate import Entry, Evaluation
from diffgraft.evaluation.evidence import Figure
from diffgraft.evaluation.measure import Measure
from diffgraft.evaluation.verdict import (
    LEAST_DIVERSITY,
    LEAST_FOLLOWING,
    LEAST_IN_STYLE,
    LEAST_LIKENESS,
    MOST_DRIFT,
    MOST_LEAK,
)

_SIDE = 256
"""Longest side in pixels of pictures in the page; larger ones are scaled down"""
_SMALL = 128
"""Side below which pictures are shown without smoothing, as lossless PNG"""
_SHADES = 5
_MOST_REFERENCES = 8


@dataclass(frozen=True)
class PagePicture:
    """A generated picture on the evaluation page, with its caption."""

    uri: str
    """Its content as a data URI; empty: no picture"""
    alt: str = ""
    css: str = ""
    is_best: bool = False


def render(evaluation: Evaluation, title: str) -> str:
    """Return the page as HTML. Texts of files and prompts are escaped; the page loads and runs nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=folder, autoescape=True, undefined=StrictUndefined).get_template("page.html")
    return template.render(**_content(evaluation, title))


def _content(evaluation: Evaluation, title: str) -> dict[str, Any]:
    best, prompts = evaluation.best, evaluation.target.prompts
    series = _Series(evaluation)
    references = evaluation.target.references[:_MOST_REFERENCES]
    return {
        "title": title,
        "subtitle": f"{_count(len(series.names), 'adapter')} at {_count(len(series.strengths), 'strength')} on "
        f"{evaluation.target.base}, {_count(len(prompts.trained), 'prompt')} with "
        f"{_count(len(evaluation.seeds), 'seed')} each",
        "best": {"title": best.title, "verdict": best.shares.verdict, "kind": _css(best)},
        "reason": evaluation.choice.reason,
        "best_pictures": [
            _picture(row[0], prompt) for prompt, row in zip(prompts.trained, best.drawn.trained, strict=True)
        ],
        "scatter": _scatter(evaluation),
        "charts": [series.chart(measure) for measure in evaluation.measures],
        "legend": series.legend,
        "seeds": len(evaluation.seeds),
        "measures": evaluation.measures,
        "encoders": evaluation.encoders,
        "bare": [number(evaluation.bare[measure.name].value) for measure in evaluation.measures],
        "rows": [_row(evaluation, entry) for entry in evaluation.entries],
        "sheets": _sheets(evaluation, series),
        "references": [_picture(reference.image, "reference") for reference in references],
        "likeness": evaluation.likeness.title,
        "following": evaluation.following.title,
        "limits": _limits(evaluation.target.is_subject),
    }


class _Series:
    """Adapters and strengths as lines: over steps where a run saved several adapters, else over strengths."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self.names = list(dict.fromkeys(entry.name for entry in evaluation.entries))
        self.strengths = sorted({entry.strength for entry in evaluation.entries})
        steps = {entry.step for entry in evaluation.entries}
        self._is_by_step = len(steps - {None}) > 1
        groups: dict[str, list[Entry]] = {}
        for entry in evaluation.entries:
            if self._is_by_step and entry.step is not None:
                groups.setdefault(f"strength {entry.strength:g}", []).append(entry)
            elif not self._is_by_step:
                groups.setdefault(entry.name, []).append(entry)
        last = max(1, len(groups) - 1)
        self._lines = [
            (name, sorted(group, key=self._x), round(place * (_SHADES - 1) / last) if len(groups) > 1 else 2)
            for place, (name, group) in enumerate(groups.items())
        ]
        self.legend = [(name, shade) for name, _, shade in self._lines] if len(self._lines) > 1 else []

    def _x(self, entry: Entry) -> float:
        return float(entry.step or 0) if self._is_by_step else entry.strength

    def chart(self, measure: Measure) -> str:
        """Return the line chart of a measure over strengths."""
        best, bare = self._evaluation.best, self._evaluation.bare[measure.name].value
        lines = [
            Line(
                name,
                [
                    Point(
                        self._x(entry), found.value, found.error, "", f"{entry.title}: {found.value:.3f}", entry is best
                    )
                    for entry in group
                    for found in [entry.figures[measure.name]]
                ],
                shade,
            )
            for name, group, shade in self._lines
        ]
        points = [point for line in lines for point in line.points]
        spans = [point.y + sign * point.error for point in points for sign in (-1, 1) if math.isfinite(point.error)]
        x = Axis.around("step" if self._is_by_step else "strength", [point.x for point in points])
        y = Axis.around(measure.title, [*(point.y for point in points), *spans, bare])
        return line_chart(f"{measure.title} over {x.label}", x, y, lines, bare)


def _scatter(evaluation: Evaluation) -> str:
    """Return the chart of likeness and prompt following, with the base alone and the Pareto front."""
    likeness, following = evaluation.likeness.name, evaluation.following.name
    points = [
        Point(
            entry.figures[likeness].value,
            entry.figures[following].value,
            math.nan,
            _css(entry),
            f"{entry.title}: {entry.shares.verdict}",
            entry is evaluation.best,
        )
        for entry in evaluation.entries
    ]
    bare = Point(evaluation.bare[likeness].value, evaluation.bare[following].value, math.nan, "base", "base alone")
    x = Axis.around(f"likeness ({evaluation.likeness.title})", [point.x for point in (*points, bare)])
    y = Axis.around(f"{evaluation.following.title}", [point.y for point in (*points, bare)])
    front = [points[place] for place in evaluation.front]
    return scatter_chart("likeness against prompt following", x, y, [*points, bare], front)


def _row(evaluation: Evaluation, entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "strength": f"{entry.strength:g}",
        "verdict": entry.shares.verdict,
        "reason": entry.shares.reason,
        "kind": _css(entry),
        "is_best": entry is evaluation.best,
        "figures": [
            (number(entry.figures[measure.name].value), difference(entry.figures[measure.name]))
            for measure in evaluation.measures
        ],
    }


def _sheets(evaluation: Evaluation, series: _Series) -> list[dict[str, Any]]:
    """Return for each prompt its pictures: adapters in rows, strengths in columns, after the base alone."""
    prompts = evaluation.target.prompts
    by_place = {(entry.name, entry.strength): entry for entry in evaluation.entries}
    sheets = []
    for kind, texts in (("trained", prompts.trained), ("of_class", prompts.of_class)):
        for place, prompt in enumerate(texts):
            rows: list[dict[str, Any]] = []
            for name in series.names:
                bare = _picture(getattr(evaluation.bare_drawn, kind)[place][0], f"base alone: {prompt}")
                pictures = [bare if not rows else PagePicture("")]
                for strength in series.strengths:
                    entry = by_place.get((name, strength))
                    if entry is None:
                        pictures.append(PagePicture(""))
                        continue
                    image = getattr(entry.drawn, kind)[place][0]
                    pictures.append(_picture(image, f"{entry.title}: {prompt}", is_best=entry is evaluation.best))
                rows.append({"name": name, "pictures": pictures})
            columns = ["base alone", *(f"{strength:g}" for strength in series.strengths)]
            sheets.append({"prompt": prompt, "columns": columns, "rows": rows})
    return sheets


def _picture(image: Image.Image, alt: str, *, is_best: bool = False) -> PagePicture:
    """Return a picture as a data URI: small ones as PNG, larger ones scaled down as WebP."""
    content, is_small = io.BytesIO(), max(image.size) <= _SMALL
    shown = image.convert("RGB")
    if is_small:
        shown.save(content, "PNG")
    else:
        shown.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        shown.save(content, "WEBP", quality=80)
    kind = "png" if is_small else "webp"
    uri = f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
    return PagePicture(uri, alt, "small" if is_small else "", is_best)


def _limits(is_subject: bool) -> str:
    """Return the limits that verdicts go by."""
    following = LEAST_FOLLOWING if is_subject else LEAST_IN_STYLE
    composed = "" if is_subject else " (for styles the mean with that of composition)"
    return (
        f"Too little: likeness below {LEAST_LIKENESS:g}. Overcooked: prompt following{composed} below {following:g}, "
        f"diversity below {LEAST_DIVERSITY:g}, class drift above {MOST_DRIFT:g} times the distance of seeds, or more "
        f"than {MOST_LEAK:g} of the likeness without the trigger."
    )


def _css(entry: Entry) -> str:
    return entry.shares.verdict.replace(" ", "-")


def number(value: float) -> str:
    """Return a figure with three decimals, without the sign of a zero; a dash if it is not known."""
    return f"{round(value, 3) + 0.0:.3f}" if math.isfinite(value) else "–"


def difference(figure: Figure) -> str:
    """Return the difference from the base alone with its standard error, such as ``+0.120 ± 0.011``."""
    if not math.isfinite(figure.gain):
        return "–"
    spread = f" ± {figure.gain_error:.3f}" if math.isfinite(figure.gain_error) else ""
    return f"{round(figure.gain, 3) + 0.0:+.3f}{spread}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
