"""The DreamBooth table, of any base, recipe and method: ``python -m benchmarks.dreambooth DATA --base BASE``.

DATA is the folder `dataset` of github.com/google/dreambooth (30 subjects, and the file `prompts_and_classes.txt`), or
one of the same layout. An adapter is trained for each subject, and drawn with 25 prompts and 4 seeds. Likeness is the
cosine with the subject's pictures in the spaces of DINO (DINO ViT-S/16) and CLIP (ViT-B/32), and prompt following the
cosine of pictures and prompts in the latter (Ruiz et al. 2022, arXiv:2208.12242, section 4.1). What is finished is kept
in the folder `--output`, where an interrupted command goes on.

Without DATA, subjects of the world of `tiny` are drawn that nothing was tuned on, in the same layout, and ``--page``
writes their page; the CLIP of `tiny` takes the place of both encoders.
"""

import argparse
import csv
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import diffgraft as dg
from benchmarks.learning.cases import UNSEEN
from diffgraft.bases import Base
from diffgraft.bases.tiny.world import draw
from diffgraft.bases.tiny.world.glyphs import HELD_BACK_FOR_TESTS, glyph_sprite
from diffgraft.bases.tiny.world.scene import SETTING_WORDS
from diffgraft.cli.console import key_values
from diffgraft.demo.subject import LEARN, Subject
from diffgraft.devices import device_of, dtype_of
from diffgraft.errors import DiffgraftError
from diffgraft.files import write_text

PAGE = Path(__file__).parent / "results" / "dreambooth.md"
PUBLISHED = {"dino": "facebook/dino-vits16", "clip": "openai/clip-vit-base-patch32"}
"""Encoders of the published table"""
MEASURES = ("dino", "clip-i", "clip-t", "contrast")
SHOWN = {"dino": "DINO", "clip-i": "CLIP-I", "clip-t": "CLIP-T"}
LIVE = ("cat", "dog")
"""Classes of living subjects, which have prompts of their own"""
_LIST = "prompts_and_classes.txt"
_STYLES = ("", ", pixel art", ", watercolour painting", ", line drawing")
HEAD = """# The DreamBooth table on `tiny`

`python -m benchmarks.dreambooth --page` wrote this page, by the command that makes the table of
[DreamBooth](https://arxiv.org/abs/2208.12242) (section 4.1) for any base: an adapter for each subject, {prompts}
prompts, {seeds} seeds. On `tiny` the subjects are {subjects} that nothing was tuned on, and its own small CLIP takes
the place of DINO and CLIP, so that these figures compare with one another alone. *DINO* and *CLIP-I*: mean cosine of
drawn pictures and pictures of the subject. *CLIP-T*: mean cosine of drawn pictures and prompts. Each with the standard
error over the subjects.

"""
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Task:
    """A subject of the table."""

    name: str
    noun: str
    images: Path
    prompts: Sequence[str]
    """Prompts with ``{trigger}`` and ``{subject}``"""


def read_tasks(data: Path) -> list[Task]:
    """Return the subjects of a folder in the layout of the published data; those without pictures are left out.

    Raises:
        DiffgraftError: the folder has no list of classes and prompts, or no subject of it.
    """
    listed = data / _LIST
    if not listed.is_file():
        raise DiffgraftError(f"{data} has no {_LIST}: give the folder `dataset` of github.com/google/dreambooth.")
    text = listed.read_text("utf-8")
    classes = [row for row in csv.reader(text.splitlines()) if len(row) == 2 and (data / row[0]).is_dir()]
    blocks = re.findall(r"^prompt_list = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    if not classes or not blocks:
        raise DiffgraftError(
            f"{listed} names no class of a folder beside it, or no list of prompts: download it again."
        )
    prompts = [[prompt.format("{trigger}", "{subject}") for prompt in re.findall(r"'([^']*)'", own)] for own in blocks]
    return [Task(name, noun, data / name, prompts[-1 if noun in LIVE else 0]) for name, noun in classes]


def write_world(data: Path) -> Path:
    """Draw subjects of the world of `tiny` into a folder of the published layout, and return it."""
    for number, name in enumerate(UNSEEN):
        glyph = HELD_BACK_FOR_TESTS[name]
        subject = Subject(name, glyph.noun, lambda glyph=glyph: glyph_sprite(glyph.glyph), (0, 0))  # type: ignore[misc]
        (data / name).mkdir(parents=True, exist_ok=True)
        for index, scene in enumerate(subject.scenes(LEARN, 300 + number)):
            draw(scene, subject.cutout())[0].save(data / name / f"{index:02}.png")
    places = [texts[0] for texts in SETTING_WORDS.values() if "{" not in texts[0]]
    prompts = [
        f"'a {{0}} {{1}} {place}{style}'.format(unique_token, class_token)," for style in _STYLES for place in places
    ]
    rows = [f"{name},{HELD_BACK_FOR_TESTS[name].noun}" for name in UNSEEN]
    lines = ["subject_name,class", *rows, "", "prompt_list = [", *prompts[:25], "]"]
    write_text(data / _LIST, "\n".join(lines) + "\n")
    return data


def measure(task: Task, base: Base, options: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, Figures]:
    """Train an adapter for a subject, unless there is one, and return its figures and those of the base alone."""
    folder = options.output / task.name
    kept = folder / "figures.json"
    if kept.is_file():
        found: dict[str, Figures] = json.loads(kept.read_text("utf-8"))
        if options.title not in found:
            raise DiffgraftError(f"{kept} has figures of other settings: give another folder with --output.")
        return found
    if any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        dg.train(base=base, resume=folder)  # a finished run is only looked up
    else:
        own = {"images": task.images, "subject": task.noun, "previews": False, **settings}
        dg.train(options.recipe, base=base, output=folder, **own)
    done = dg.evaluate(
        folder, base=base, strengths=[options.strength], seeds=options.seeds, prompts=task.prompts[: options.prompts],
        measures=MEASURES, encoders={} if base.name == "tiny" else PUBLISHED, output=folder / "evaluation",
    )  # fmt: skip
    entry = done.best
    figures = {
        options.title: {name: entry.figures[name].value for name in SHOWN},
        "the base alone": {name: done.bare[name].value for name in SHOWN},
    }
    write_text(kept, json.dumps(figures, indent=1) + "\n")
    return figures


def table(found: Sequence[Mapping[str, Figures]]) -> str:
    """Return the table of the means over all subjects, with standard errors."""
    lines = ["| | " + " | ".join(SHOWN.values()) + " |", "|-" * (len(SHOWN) + 1) + "|"]
    for title in found[0]:
        cells = []
        for name in SHOWN:
            values = [figures[title][name] for figures in found]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            cells.append(f"{statistics.fmean(values):.3f} ± {error:.3f}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dreambooth", description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="folder `dataset` of github.com/google/dreambooth")
    parser.add_argument("--base", default="tiny", help="base, as for `diffgraft train`")
    parser.add_argument("--recipe", default="subject", help="recipe")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings, such as method=loha")
    parser.add_argument("--strength", type=float, default=1.0, help="strength of the adapters")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--prompts", type=int, default=25, help="the first prompts of each subject")
    parser.add_argument("--subjects", type=int, default=30, help="the first subjects")
    parser.add_argument("--output", type=Path, default=Path("runs/dreambooth"), help="folder of runs and pictures")
    parser.add_argument("--page", action="store_true", help="write the page of `tiny`")
    options = parser.parse_args(arguments)
    settings = key_values(options.set)
    options.title = " ".join((options.recipe, *options.set))
    device = device_of("")
    base = dg.load_base(options.base, dtype_of("", device)).to(device)
    tasks = read_tasks(options.data or write_world(options.output / "data"))[: options.subjects]
    found = [measure(task, base, options, settings) for task in tqdm(tasks, "subjects")]
    print(table(found))
    if options.page:
        counts = {"prompts": len(tasks[0].prompts[: options.prompts]), "seeds": options.seeds, "subjects": len(tasks)}
        write_text(PAGE, HEAD.format(**counts) + table(found))


if __name__ == "__main__":
    main()
