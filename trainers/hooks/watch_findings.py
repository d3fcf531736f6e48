"""What the curves of a watch tell: pictures that do not belong, copies, pictures learned by heart, and finished ones.

Pictures differ in how hard they are to predict, so that losses are compared with others of the same picture. The gain
of a prompt is the logarithm of errors under the empty prompt over those under the picture's own. Its mean over the run
is small for a picture that the others do not help to learn, and for a caption that does not tell what is there, as the
area under the margin is for wrong labels (Pleiss et al. 2020, arXiv:2001.10528). A fall is the logarithm of a loss over
that at the first measurement.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from diffgraft.trainers.hooks.watch_record import WatchRecord, log_ratio

Kind = Literal["outlier", "near-duplicate", "memorized", "finished"]
_OUTLIER = 0.5
"""Share of the other pictures' median gain below which a picture does not belong"""
_LEAST_GAIN = 0.01
"""Median gain from which a measurement counts: before, the adapter has learned nothing yet"""
_LEAST_OTHERS = 3
"""Number of other pictures that a picture is compared with at least"""
_MEMORIZED = 0.7
"""Share of the others' remaining loss below which a picture is learned by heart"""
_FLAT = 0.1
"""Share of its whole fall that the loss of a finished picture changes by in the last third of the run"""
_LEAST_FALL = 0.05
"""Fall of a loss that counts as learning"""
_LEAST_MEASUREMENTS = 4
"""Number of measurements that memorized and finished pictures are judged by at least"""


@dataclass(frozen=True)
class Finding:
    """A picture that stands out, or a pair of near-duplicates."""

    kind: Kind
    pictures: tuple[str, ...]
    sentence: str
    """What was found, and what to do"""

    @property
    def is_warning(self) -> bool:
        """Whether there may be something to put right."""
        return self.kind != "finished"

    def as_json(self) -> dict[str, Any]:
        """Return the finding as JSON types."""
        return asdict(self)


def find(record: WatchRecord) -> list[Finding]:
    """Return everything that stands out in a record."""
    curves = [record.curve(index) for index in range(len(record.pictures))]
    falls = {index: [log_ratio(loss, curve[0]) for loss in curve] for index, curve in enumerate(curves)}
    outliers = list(_outliers(record))
    memorized = list(_memorized(record, falls))
    named = {name for finding in (*outliers, *memorized) for name in finding.pictures}
    finished = [name for name in _finished(record, falls) if name not in named]
    return [*outliers, *_copies(record), *memorized, *_as_one(finished)]


def table(record: WatchRecord, findings: Sequence[Finding]) -> list[str]:
    """Return the loss of each picture at the first and the last measurement, and what stands out, as lines of text."""
    kinds: dict[str, list[str]] = {}
    for finding in findings:
        for name in finding.pictures:
            kinds.setdefault(name, []).append(finding.kind)
    if not record.steps:
        return ["nothing has been measured yet"]
    rows = [["picture", f"step {record.steps[0]}", f"step {record.steps[-1]}", "change", "what stands out"]]
    for index, picture in enumerate(record.pictures):
        first, last = record.curve(index)[0], record.curve(index)[-1]
        change = f"{100 * (last / first - 1):+.0f} %" if first > 0 and math.isfinite(last / first) else "–"
        what = ["held out"] if picture.is_held_out else kinds.get(picture.name, [])
        rows.append([picture.name, f"{first:.4f}", f"{last:.4f}", change, ", ".join(what)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, *(finding.sentence for finding in findings)]


def mean_gains(record: WatchRecord) -> dict[int, float]:
    """Index of each training picture with a prompt → its mean gain, over the measurements by which most gain something.

    Empty before there is such a measurement.
    """
    watched = [index for index in record.trained if record.pictures[index].prompt]
    rows = [[row[index] for index in watched] for row in record.gains[1:]]
    learned = [row for row in rows if row and math.isfinite(sum(row)) and statistics.median(row) > _LEAST_GAIN]
    columns = zip(*learned, strict=True) if learned else ()
    return {index: statistics.fmean(column) for index, column in zip(watched, columns, strict=bool(learned))}


def _outliers(record: WatchRecord) -> Iterator[Finding]:
    """Yield the pictures whose prompt gains much less than those of the others do."""
    means = mean_gains(record)
    for index, mean in means.items():
        others = [own for other, own in means.items() if other != index]
        if len(others) < _LEAST_OTHERS:
            continue
        usual = statistics.median(others)
        if mean < _OUTLIER * usual and usual > 0:
            name = record.pictures[index].name
            yield Finding(
                "outlier",
                (name,),
                f"{name} stands apart: its prompt changes its loss by {_change(mean)} on average over the run, the "
                f"prompts of the other pictures theirs by {_change(usual)}. Look whether it is a wrong picture or "
                f"has a wrong caption; remove it, or count it less with picture_weights.{name}=0.1.",
            )


def _copies(record: WatchRecord) -> Iterator[Finding]:
    for pair in record.near_duplicates:
        yield Finding(
            "near-duplicate",
            pair,
            f"{pair[0]} and {pair[1]} are nearly the same picture, which therefore counts twice: remove one, or halve "
            f"both, picture_weights.{pair[0]}=0.5 picture_weights.{pair[1]}=0.5.",
        )


def _memorized(record: WatchRecord, falls: Mapping[int, Sequence[float]]) -> Iterator[Finding]:
    """Yield the pictures whose loss falls far below that of held-out pictures, or without these, of the others."""
    if len(record.steps) < _LEAST_MEASUREMENTS:
        return
    last = {index: falls[index][-1] for index in falls if math.isfinite(falls[index][-1])}
    held_out = [last[index] for index in record.held_out if index in last]
    for index in record.trained:
        others = held_out or [last[other] for other in record.trained if other != index and other in last]
        if index not in last or len(others) < (1 if held_out else _LEAST_OTHERS):
            continue
        usual = statistics.median(others)
        if math.exp(last[index] - usual) < _MEMORIZED:
            name = record.pictures[index].name
            whom = "held-out pictures" if held_out else "the other pictures"
            yield Finding(
                "memorized",
                (name,),
                f"{name} is learned by heart: {_share(last[index])} of its loss is left, of that of {whom} "
                f"{_share(usual)}. Train for fewer steps, or count it less with picture_weights.{name}=0.5.",
            )


def _finished(record: WatchRecord, falls: Mapping[int, Sequence[float]]) -> Iterator[str]:
    """Yield the names of the pictures whose loss has fallen and no longer changes."""
    count = len(record.steps)
    if count < _LEAST_MEASUREMENTS:
        return
    for index in record.trained:
        curve = falls[index]
        if all(map(math.isfinite, curve)) and -curve[-1] > _LEAST_FALL:
            late = curve[-max(2, count // 3) :]
            if max(late) - min(late) < _FLAT * -curve[-1]:
                yield record.pictures[index].name


def _as_one(finished: Sequence[str]) -> Iterator[Finding]:
    if finished:
        names = ", ".join(finished[:3]) + (f" and {len(finished) - 3} more" if len(finished) > 3 else "")
        have = "has" if len(finished) == 1 else "have"
        yield Finding(
            "finished",
            tuple(finished),
            f"{names} {have} been learned: the loss has fallen, and did not change in the last third of the run.",
        )


def _change(gain: float) -> str:
    """Return a gain as the change of the loss that it means."""
    return f"{100 * (math.exp(-gain) - 1):+.0f} %"


def _share(fall: float) -> str:
    """Return a fall as a share of the first loss."""
    return f"{100 * math.exp(fall):.0f} %"
