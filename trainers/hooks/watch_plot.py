"""Plot of a watch: the curve of every picture, and the pictures that stand out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffgraft.data.pictures import Picture, UnreadablePictureError
from diffgraft.files import atomic_write
from diffgraft.trainers.hooks.watch_findings import Finding, Kind
from diffgraft.trainers.hooks.watch_record import WatchRecord

PLOT_NAME = "watch.png"
"""Name of the plot's file in the folder of a run"""
_COLOURS: Mapping[Kind, str] = {
    "outlier": "#d62728",
    "near-duplicate": "#9467bd",
    "memorized": "#1f77b4",
    "finished": "#2ca02c",
}
_MOST_SHOWN = 6
"""Number of pictures that are shown beside the curves"""
_SIDE = 192
"""Longest side of these pictures in pixels"""


def save_watch_plot(record: WatchRecord, findings: Sequence[Finding], pictures: Sequence[Picture], path: Path) -> Path:
    """Plot the loss of each picture against that at the first measurement, and return the path.

    Pictures that stand out have the colour of what was found first, and are shown beside the curves; held-out pictures
    have dashed lines.

    Args:
        record: all measurements.
        findings: what was found in them.
        pictures: the files of the pictures.
        path: path of the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds: dict[str, Kind] = {}
    for finding in findings:
        for name in finding.pictures:
            kinds.setdefault(name, finding.kind)
    shown = _thumbnails([name for name, kind in kinds.items() if kind != "finished"], pictures)
    rows = max(3, len(shown))
    figure = Figure(figsize=(9 if shown else 7, max(4.5, 1.4 * rows)), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.add_gridspec(rows, 4)
    axes = figure.add_subplot(places[:, : 3 if shown else 4])
    _draw_curves(axes, record, kinds)
    for row, (name, image) in enumerate(shown.items()):
        side = figure.add_subplot(places[row, 3])
        side.imshow(image)
        side.set_axis_off()
        side.set_title(f"{_short(name)}: {kinds[name]}", fontsize=8, color=_COLOURS[kinds[name]])
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
    return path


def _draw_curves(axes: Any, record: WatchRecord, kinds: Mapping[str, Kind]) -> None:
    """Draw all curves, those that stand out over the others, and the legend of what they mean."""
    labelled: set[str] = set()
    for index, picture in enumerate(record.pictures):
        curve = record.curve(index)
        relative = [loss / curve[0] if curve[0] > 0 else 1.0 for loss in curve]
        kind = None if picture.is_held_out else kinds.get(picture.name)
        label = "held out" if picture.is_held_out else kind or "others"
        style = {"color": _COLOURS[kind] if kind else "#888888", "linestyle": "--" if picture.is_held_out else "-"}
        width = 2.0 if kind not in (None, "finished") else 1.0
        axes.plot(
            record.steps,
            relative,
            linewidth=width,
            zorder=width,
            label=None if label in labelled else label,
            **style,
        )
        labelled.add(label)
    axes.set(xlabel="step", ylabel="loss at fixed noise, against the first", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


def _thumbnails(names: Sequence[str], pictures: Sequence[Picture]) -> dict[str, Image.Image]:
    """Return small copies of the first pictures that have these names and can be read."""
    files = {picture.name: picture for picture in pictures}
    small: dict[str, Image.Image] = {}
    for name in names:
        if name in files and len(small) < _MOST_SHOWN:
            try:
                image = files[name].image
            except UnreadablePictureError:
                continue
            image.thumbnail((_SIDE, _SIDE))
            small[name] = image
    return small


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"…{name[-23:]}"
