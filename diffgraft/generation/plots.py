"""Pictures for people: grids with captions, and the curve of a loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffgraft.files import atomic_write


def grid(rows: Mapping[str, Sequence[Image.Image]], smallest: int = 128) -> Image.Image:
    """Rows of pictures, each row under its label, in cells of the first picture's size.

    Small pictures are enlarged to `smallest` pixels, unsmoothed; those of another shape keep it, on white.
    """
    first = next(iter(rows.values()))[0]
    zoom = max(1, -(-smallest // first.width))
    width, height = first.width * zoom, first.height * zoom
    count = max(len(images) for images in rows.values())
    font = ImageFont.load_default(13)
    line, gap = 20, 6
    total_width = max(count * (width + gap) + gap, 6 + max(int(font.getlength(label)) for label in rows) + 12)
    sheet = Image.new("RGB", (total_width, len(rows) * (height + line + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (label, images) in enumerate(rows.items()):
        top = row * (height + line + gap)
        pen.text((gap, top + 2), label, (70, 70, 70), font)
        for number, image in enumerate(images):
            how = Image.Resampling.NEAREST if image.size == first.size else Image.Resampling.LANCZOS
            enlarged = ImageOps.pad(image.convert("RGB"), (width, height), how, "white")
            sheet.paste(enlarged, (gap + number * (width + gap), top + line))
    return sheet


def save_image(image: Image.Image, path: Path) -> Path:
    """Write a picture, whole or not at all."""
    with atomic_write(path) as partial:
        image.save(partial)
    return path


def save_loss_plot(curves: Mapping[str, Mapping[int, float]], path: Path) -> Path:
    """Losses over the steps they are of; linear axes from zero.

    Those of every step are drawn as points with their running mean; those of some are joined.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    most = max(map(len, curves.values()), default=0)
    for name, points in curves.items():
        steps, values = list(points), list(points.values())
        if len(points) == most:
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


def running_mean(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential mean, corrected at its start for having seen little."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out
