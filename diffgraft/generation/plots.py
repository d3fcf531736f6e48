"""Grids of labelled pictures, and plots of losses."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffgraft.files import atomic_write

_LINE, _GAP = 20, 6
"""Height of a label in a grid, and distance of its pictures, in pixels"""


def grid(rows: Mapping[str, Sequence[Image.Image]], smallest: int = 128) -> Image.Image:
    """Lay out rows of pictures, each row under its label, in cells of the first picture's size.

    Cells narrower than `smallest` pixels are enlarged by a whole factor, without smoothing. Pictures of another shape
    keep it, on white.
    """
    first = next(iter(rows.values()))[0]
    zoom = max(1, -(-smallest // first.width))
    width, height = first.width * zoom, first.height * zoom
    count = max(len(images) for images in rows.values())
    font = ImageFont.load_default(13)
    line, gap = _LINE, _GAP
    total_width = max(count * (width + gap) + gap, 6 + max(int(font.getlength(label)) for label in rows) + 12)
    sheet = Image.new("RGB", (total_width, len(rows) * (height + line + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (label, images) in enumerate(rows.items()):
        top = row * (height + line + gap)
        pen.text((gap, top + 2), label, (70, 70, 70), font)
        for number, image in enumerate(images):
            resampling = Image.Resampling.NEAREST if image.size == first.size else Image.Resampling.LANCZOS
            enlarged = ImageOps.pad(image.convert("RGB"), (width, height), resampling, "white")
            sheet.paste(enlarged, (gap + number * (width + gap), top + line))
    return sheet


def row_starts(sheet: Image.Image, rows: int) -> list[Image.Image]:
    """Return the first picture of each row of a `grid` of square pictures; none if the sheet is none of `rows` rows."""
    height, rest = divmod(sheet.height, max(1, rows))
    side = height - _LINE - _GAP
    if rest or side <= 0 or sheet.width < side + 2 * _GAP:
        return []
    return [sheet.crop((_GAP, row * height + _LINE, _GAP + side, row * height + _LINE + side)) for row in range(rows)]


def save_image(image: Image.Image, path: Path) -> Path:
    """Write a picture to a file atomically."""
    with atomic_write(path) as partial:
        image.save(partial)
    return path


def save_loss_plot(curves: Mapping[str, Mapping[int, float]], path: Path) -> Path:
    """Plot losses over steps, on linear axes from zero, and return the path.

    Curves with a value for every step are drawn as points with their running mean, sparser curves as connected points.

    Args:
        curves: name of a loss → step → value.
        path: path of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max(map(len, curves.values()), default=0)
    for name, points in curves.items():
        steps, values = list(points), list(points.values())
        if len(points) == longest:
            (dots,) = axes.plot(steps, values, ".", markersize=3, alpha=0.35)
            axes.plot(steps, running_mean(values), color=dots.get_color(), label=f"{name} (running mean)")
        else:
            axes.plot(steps, values, "o-", markersize=4, label=name)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
    return path


def running_mean(values: Sequence[float], decay: float = 0.95) -> list[float]:
    """Return the exponential moving average of `values`, with bias correction for its first values."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight)
    return means
