"""The page of results: a table for each target, and a sheet with generated pictures of each method."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.learning.cases import UNSEEN, VARIANTS
from benchmarks.learning.measure import DRAWINGS, bounds
from benchmarks.learning.targets import Target, made_up, of_held_back
from diffgraft.data.image_folder import read_folder
from diffgraft.files import write_text
from diffgraft.generation.plots import grid, save_image

FOLDER = Path(__file__).parents[1]
RESULTS = FOLDER / "results"
SHEETS = FOLDER / "pictures"

HEAD = """# How well each method learns

`python -m benchmarks.learning --photos PHOTOS` wrote this page. PHOTOS contains the folders `backpack`, `cat`, `dog`,
`red_cartoon`, `teapot` and `vase` of the [DreamBooth data set](https://github.com/google/dreambooth). Methods are
trained with their settings in the recipes, on the embedded base `tiny` at 64 × 64 pixels. Figures are means over the
seeds, ± the standard deviation.

- *processor time*: time of the training loop, summed over the cores.
- *held-out loss*: loss before → after training, of pictures that were not trained on, over 256 fixed pairs of timestep
  and noise; for subjects only on their own pixels. *reduction*: decrease of this loss, as a share of the loss before
  training.
- *gap closed* (subjects): decrease of the held-out loss, as a share of its excess over the loss on things that the base
  knows, {known:.3f}. Of several subjects it is computed from their mean losses, as some have a smaller loss than those
  things from the start; for such a subject alone it has no meaning (–).
- *gain without trigger*: the decrease of the held-out loss for prompts without the trigger, as a share of the decrease
  with it; below 0, the loss increased.
- *class drift*: change of the base's predictions for pictures of the class (for the style: for pictures in other
  styles), as mean squared difference × 1000.
- *similarity*: mean cosine similarity, by the judge's features, between generated pictures and reference drawings of
  the same subject or style in the same setting.
- *shown*: share of generated pictures that show the subject or style: their features are nearer to the mean of
  references with it than to the mean of references without it. This is lenient: a blob in the right colours counts.
  *followed*: share with the setting of the prompt (for the style: with its thing and setting). *both*: share with both.
  All prompts are new: no training picture shows the subject in these settings, or the style with these pairs of thing
  and setting.
- *shape* (subjects): intersection over union of the silhouette in generated pictures on plain backgrounds and of the
  subject's own outline at the best mirroring, rotation, scale and position; the mean of twelve pictures. Colours do not
  count in it. In brackets: as a share of the shape of reference drawings on the same backgrounds.
"""

Row = dict[str, Any]
COLUMNS: dict[str, Callable[[Sequence[Row]], str]] = {
    "seeds": lambda rows: str(len(rows)),
    "parameters": lambda rows: f"{round(mean(rows, 'parameters')):,}",
    "file": lambda rows: file_size(mean(rows, "bytes")),
    "processor time": lambda rows: f"{mean(rows, 'processor seconds'):.0f} s",
    "held-out loss": lambda rows: f"{mean(rows, 'before'):.3f} → {mean(rows, 'after'):.3f}",
    "reduction": lambda rows: f"{100 * mean(rows, 'fall'):.1f} %{spread(rows, 'fall')}",
    "gap closed": lambda rows: gap_closed(rows),
    "gain without trigger": lambda rows: f"{100 * mean(rows, 'gain without trigger'):.0f} %",
    "class drift": lambda rows: f"{1000 * mean(rows, 'class drift'):.1f}",
}
VERDICTS = {
    "similarity": "similarity",
    "shown": "shown",
    "followed": "followed",
    "both": "shown as asked",
    "shape": "shape",
}
"""Title of a column → figure of generated pictures"""


def mean(rows: Sequence[Row], key: str) -> float:
    """Return the mean of a figure over the seeds."""
    return float(statistics.mean(row[key] for row in rows))


def spread(rows: Sequence[Row], key: str) -> str:
    """Return the standard deviation over the seeds in percent, or an empty string for a single seed."""
    return f" ± {100 * statistics.stdev(row[key] for row in rows):.1f}" if len(rows) > 1 else ""


def known_loss(row: Row) -> float:
    """Return the loss on things that the base knows, by which the gap of a row was computed."""
    known: float = row["before"] - (row["before"] - row["after"]) / row["gap closed"]
    return known


def gap_closed(rows: Sequence[Row]) -> str:
    """Return the share of the gap that mean losses tell, with its spread over the seeds if there is one subject."""
    before, known = mean(rows, "before"), known_loss(rows[0])
    if before <= known:
        return "–"
    share = 100 * (before - mean(rows, "after")) / (before - known)
    return f"{share:.0f} %{spread(rows, 'gap closed') if len({row['target'] for row in rows}) == 1 else ''}"


def file_size(count: float) -> str:
    """Return a number of bytes in kB or MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def verdict(name: str, value: float, extremes: dict[str, dict[str, float]]) -> str:
    """Return the text of a verdict: shares in percent, others as numbers; shapes also as a share of the drawings'."""
    if name == "shape":
        return f"{value:.2f} ({100 * value / extremes[DRAWINGS]['shape']:.0f} %)"
    return f"{value:.2f}" if name == "similarity" else f"{100 * value:.0f} %"


def table(by_variant: dict[str, list[Row]], extremes: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table with a row for each variant, and below these the rows of `extremes` for comparison."""
    figures = next(iter(by_variant.values()))[0]  # the rows of a table have the same figures
    columns = {name: column for name, column in COLUMNS.items() if name != "gap closed" or name in figures}
    drawn = {name: key for name, key in VERDICTS.items() if extremes and key in figures}
    lines = ["| | " + " | ".join([*columns, *drawn]) + " |", "|-" * (1 + len(columns) + len(drawn)) + "|"]
    for variant, rows in by_variant.items():
        cells = [column(rows) for column in columns.values()]
        cells += [verdict(name, mean(rows, key), extremes) for name, key in drawn.items()]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    for name, values in extremes.items():
        cells = ["–"] * len(columns) + [verdict(title, values[key], extremes) for title, key in drawn.items()]
        lines.append(f"| *{name}* | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sheet(target: Target, pictures: Path, variants: Sequence[str]) -> Image.Image | None:
    """Return a sheet of training pictures, pictures before training, and pictures of each variant with the first seed.

    None if pictures of a variant are missing.
    """
    rows = {"training pictures": [picture.image for picture in read_folder(target.learn)]}
    for variant in ("before", *variants):
        folder = pictures / target.name / variant
        if not folder.is_dir():
            return None
        drawn = [picture.image for picture in read_folder(folder)]
        rows[variant] = [drawn[place * len(drawn) // 12] for place in range(12)]
    return grid(rows, smallest=64)


def write_page(record: Path, pictures: Path) -> Path:
    """Write ``learning.md`` beside the record, and a sheet for each target with pictures in the folder `pictures`."""
    rows = [json.loads(line) for line in record.read_text("utf-8").splitlines()]
    places = list(VARIANTS)
    rows.sort(key=lambda row: (places.index(row["variant"]), row["target"], row["seed"]))
    targets = made_up()
    unseen = grouped([row for row in rows if row["target"] in UNSEEN], "variant")
    known = known_loss(next(row for row in rows if "gap closed" in row))
    parts = [HEAD.format(known=known), part_of_unseen(unseen)]
    for name, target in targets.items():
        by_variant = grouped([row for row in rows if row["target"] == name], "variant")
        if not by_variant:
            continue
        write_sheet(target, pictures, list(by_variant))
        parts.append(f"## {name}\n\n{table(by_variant, bounds(target))}")
        parts.append(f"![Pictures of the {name} that each method generates](../pictures/learning-{name}.png)\n")
    photos = grouped([row for row in rows if row["target"] not in (*targets, *UNSEEN)], "target")
    if photos:
        parts.append(
            f"## photographs, with lora\n\nEvery third picture is held out of training.\n\n{table(photos, {})}"
        )
    return write_text(record.with_suffix(".md"), "\n".join(parts))


def grouped(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """Return the rows by the value of one of their fields, in the order in which the values appear."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def part_of_unseen(by_variant: dict[str, list[Row]]) -> str:
    """Return the part of the page on unseen subjects: the mean of each variant, and `lora` for each subject."""
    each = {name: bounds(of_held_back(name)) for name in UNSEEN}
    mean_bounds = {
        title: {key: statistics.mean(own[title][key] for own in each.values()) for key in figures}
        for title, figures in next(iter(each.values())).items()
    }
    if "lora" not in by_variant:
        return ""
    of_lora = grouped(by_variant["lora"], "target")
    lines = ["| `lora` | held-out loss | gap closed | gain without trigger | both | shape |", "|-|-|-|-|-|-|"]
    for name, rows in of_lora.items():
        shape = verdict("shape", mean(rows, "shape"), each[name])
        asked = verdict("both", mean(rows, "shown as asked"), {})
        cells = [COLUMNS[column](rows) for column in ("held-out loss", "gap closed", "gain without trigger")]
        lines.append(f"| {name} | {' | '.join(cells)} | {asked} | {shape} |")
    return (
        f"## {len(UNSEEN)} unseen subjects\n\n"
        "No picture of the base's training shows them, and no setting was tuned on them. ± is over subjects and "
        "seeds.\n\n"
        f"{table(by_variant, mean_bounds)}\n" + "\n".join(lines) + "\n"
    )


def write_sheet(target: Target, pictures: Path, variants: Sequence[str]) -> None:
    """Write the sheet of a target, if there are pictures of all its variants."""
    made = sheet(target, pictures, variants)
    if made is not None:
        save_image(made.quantize(256, dither=Image.Dither.NONE), SHEETS / f"learning-{target.name}.png")
