"""The page about the record: a table for each target, and a sheet of what each method draws."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.learning.cases import VARIANTS
from benchmarks.learning.measure import bounds
from benchmarks.learning.targets import Target, made_up
from diffgraft.data.image_folder import read_folder
from diffgraft.files import write_text
from diffgraft.generation.plots import grid, save_image

FOLDER = Path(__file__).parents[1]
RESULTS = FOLDER / "results"
SHEETS = FOLDER / "pictures"

HEAD = """# How well each method learns

`python -m benchmarks.learning --photos PHOTOS` wrote this page, PHOTOS being the folders `backpack`, `cat`, `dog`,
`red_cartoon`, `teapot` and `vase` of the [DreamBooth data set](https://github.com/google/dreambooth). Every method
trains with the settings that its recipe has for it, on the embedded base at 64 × 64 pixels; figures are means over the
seeds, with the standard deviation over them behind ±.

- *processor time*: of the training loop, summed over the cores in use.
- *held-out loss*: of pictures that training never saw, over 256 fixed pairs of timestep and noise; of the poodle and
  the alien on their own pixels only. *fall* is its change as a share of what it was.
- *without the trigger*: what the prompt without the trigger gained, as a share of the fall; below 0, it got worse.
- *class drift*: how far the base's predictions for pictures of the class (for the style: of unstyled pictures) moved,
  mean squared difference × 1000.
- *similarity*: mean cosine of the judge's features between what is drawn and reference drawings of the same subject or
  style in the same setting.
- *shown*: share of pictures that show what was learnt, by the nearer mean of reference features with it and without
  it; lenient, as a blob in the right colours counts. *followed*: share with the setting (for the style: thing and
  setting) that the prompt asks for; *both*: share with both. Prompts ask for settings that were in no picture of the
  subject, and for things and settings that the style was never shown with.
"""

Row = dict[str, Any]
COLUMNS: dict[str, Callable[[Sequence[Row]], str]] = {
    "seeds": lambda rows: str(len(rows)),
    "parameters": lambda rows: f"{round(mean(rows, 'parameters')):,}",
    "file": lambda rows: file_size(mean(rows, "bytes")),
    "processor time": lambda rows: f"{mean(rows, 'processor seconds'):.0f} s",
    "held-out loss": lambda rows: f"{mean(rows, 'before'):.3f} → {mean(rows, 'after'):.3f}",
    "fall": lambda rows: f"{100 * mean(rows, 'fall'):.1f} %{spread(rows, 'fall')}",
    "without the trigger": lambda rows: f"{100 * mean(rows, 'gain without trigger'):.0f} %",
    "class drift": lambda rows: f"{1000 * mean(rows, 'class drift'):.1f}",
}
VERDICTS = {"similarity": "similarity", "shown": "shown", "followed": "followed", "both": "shown as asked"}


def mean(rows: Sequence[Row], key: str) -> float:
    """Mean over the seeds."""
    return float(statistics.mean(row[key] for row in rows))


def spread(rows: Sequence[Row], key: str) -> str:
    """Standard deviation over the seeds in percent; nothing where there is but one."""
    return f" ± {100 * statistics.stdev(row[key] for row in rows):.1f}" if len(rows) > 1 else ""


def file_size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def verdict(name: str, value: float) -> str:
    """A share in percent, a similarity as it is."""
    return f"{value:.2f}" if name == "similarity" else f"{100 * value:.0f} %"


def table(by_variant: dict[str, list[Row]], extremes: dict[str, dict[str, float]]) -> str:
    """Markdown: a line for each variant; the extremes stand below, for comparison."""
    drawn = VERDICTS if extremes else {}
    lines = ["| | " + " | ".join([*COLUMNS, *drawn]) + " |", "|-" * (1 + len(COLUMNS) + len(drawn)) + "|"]
    for variant, rows in by_variant.items():
        cells = [column(rows) for column in COLUMNS.values()]
        cells += [verdict(name, mean(rows, key)) for name, key in drawn.items()]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    for name, values in extremes.items():
        cells = ["–"] * len(COLUMNS) + [verdict(title, values[key]) for title, key in drawn.items()]
        lines.append(f"| *{name}* | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sheet(target: Target, pictures: Path, variants: Sequence[str]) -> Image.Image | None:
    """What was learnt from, what the bare base draws, and what each variant draws with the first seed."""
    rows = {"learnt from": [picture.image for picture in read_folder(target.learn)]}
    for variant in ("before", *variants):
        folder = pictures / target.name / variant
        if not folder.is_dir():
            return None
        drawn = [picture.image for picture in read_folder(folder)]
        rows[variant] = [drawn[place * len(drawn) // 12] for place in range(12)]
    return grid(rows, smallest=64)


def write_page(record: Path, pictures: Path) -> Path:
    """Write ``learning.md`` beside the record, and the sheets of the targets whose pictures are there."""
    rows = [json.loads(line) for line in record.read_text("utf-8").splitlines()]
    places = list(VARIANTS)
    rows.sort(key=lambda row: (places.index(row["variant"]), row["target"], row["seed"]))
    parts = [HEAD]
    targets = made_up()
    for name in targets:
        by_variant: dict[str, list[Row]] = {}
        for row in rows:
            if row["target"] == name:
                by_variant.setdefault(row["variant"], []).append(row)
        made = sheet(targets[name], pictures, list(by_variant))
        if made is not None:
            save_image(made.quantize(256, dither=Image.Dither.NONE), SHEETS / f"learning-{name}.png")
        parts.append(f"## {name}\n\n{table(by_variant, bounds(targets[name]))}")
        parts.append(f"![What each method draws of the {name}](../pictures/learning-{name}.png)\n")
    photos: dict[str, list[Row]] = {}
    for row in rows:
        if row["target"] not in targets:
            photos.setdefault(row["target"], []).append(row)
    if photos:
        parts.append(
            f"## photographs, with lora\n\nEvery third picture is left out of training.\n\n{table(photos, {})}"
        )
    return write_text(record.with_suffix(".md"), "\n".join(parts))
