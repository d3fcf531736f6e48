"""The command `evaluate`: which of a run's adapters to use, and at which strength."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffgraft.cli.console import say, shown_progress, width_height
from diffgraft.cli.options import PROGRESS

if TYPE_CHECKING:
    from diffgraft.evaluation.evaluate import Entry, Evaluation

_ASKED, _DRAWN = "What is compared", "How pictures are drawn"
JSON_NAME, PAGE_NAME = "evaluation.json", "evaluation.html"


def evaluate(
    source: Annotated[
        list[str],
        typer.Argument(metavar="RUN|ADAPTER...", help="A run, of which all saved adapters are compared, or files."),
    ],
    strengths: Annotated[str, typer.Option(help="Strengths of each adapter.")] = "0.6,0.8,1,1.2",
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each prompt; errors need at least 3.")] = 4,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file with a prompt on each line; those without the trigger are of the class. [default: those of "
            "the recipe's samples]",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Pictures of what was to be learned. [default: the training pictures]", rich_help_panel=_ASKED
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="Pictures that were not trained on, for the held-out loss. [default: the recipe's validation.images]",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a measure, such as patches, clip-i, contrast, kid; again for more. [default: all usual ones]",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="TASK=MODEL: hub id or folder of the model for clip, dino, patches or pickscore; again for more.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    trigger: Annotated[
        str, typer.Option(help="Trigger, if neither recipe nor header tells it.", rich_help_panel=_ASKED)
    ] = "",
    subject: Annotated[
        str, typer.Option(help="Class noun, if neither recipe nor header tells it.", rich_help_panel=_ASKED)
    ] = "",
    masker: Annotated[
        str,
        typer.Option(
            help="Hub id or folder of a CLIPSeg or segmentation model that finds the subject in drawn pictures; the "
            "measure patches then compares in both directions.",
            rich_help_panel=_ASKED,
        ),
    ] = "",
    base: Annotated[
        str, typer.Option(help="The base. [default: that of the run, or of the header]", rich_help_panel=_DRAWN)
    ] = "",
    size: Annotated[
        str, typer.Option(help="WIDTHxHEIGHT in pixels. [default: the base's native size]", rich_help_panel=_DRAWN)
    ] = "",
    steps: Annotated[int, typer.Option(help="Number of denoising steps.", rich_help_panel=_DRAWN)] = 25,
    guidance: Annotated[
        float | None,
        typer.Option(help="Scale of classifier-free guidance. [default: the base's]", rich_help_panel=_DRAWN),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="float32, float16 or bfloat16. [default: float16 on a GPU, else float32]", rich_help_panel=_DRAWN
        ),
    ] = "",
    device: Annotated[
        str, typer.Option(help="cuda, mps, cpu, … [default: the GPU, or cpu]", rich_help_panel=_DRAWN)
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the results. [default: RUN/evaluation, or evaluation]"),
    ] = None,
    progress: Annotated[str, PROGRESS] = "auto",
) -> None:
    """Compare the adapters of a run at several strengths, and recommend one.

    They are drawn with the same prompts and seeds, and measured: likeness, prompt following, diversity, class drift.
    Writes evaluation.json and evaluation.html. Another call draws only what is new.

    For example: diffgraft evaluate runs/dog
    """
    given: dict[str, Any] = {
        "base": base,
        "images": images,
        "held_out": held_out,
        "prompts": prompts,
        "trigger": trigger,
        "subject": subject,
        "masker": masker,
        "measures": measure,
        "encoders": _encoders(encoder or []),
        "precision": precision,
        "device": device,
        "output": output,
    }
    options = {name: value for name, value in given.items() if value}
    options |= {"strengths": _numbers(strengths), "seeds": seeds}
    width_and_height = width_height(size)

    from diffgraft.evaluation.evaluate import evaluate as compare
    from diffgraft.evaluation.page import render
    from diffgraft.files import write_text
    from diffgraft.generation.settings import DrawSettings

    settings = DrawSettings(size=width_and_height, steps=steps, guidance=guidance)
    with shown_progress(progress):
        done = compare(*source, settings=settings, **options)
    for line in table(done):
        say(line)
    say("")
    say(done.choice.reason)
    text = json.dumps(done.as_json(), indent=1, ensure_ascii=False, allow_nan=False)
    say(write_text(done.folder / JSON_NAME, text + "\n"))
    say(write_text(done.folder / PAGE_NAME, render(done, f"Evaluation of {_named(source)}")))


def table(evaluation: "Evaluation") -> list[str]:
    """Return the lines of a table of what verdicts go by: figures, and their difference from the base alone."""
    from diffgraft.evaluation.page import difference, number

    shown = evaluation.main_measures
    head = ["", "verdict", *(measure.title for measure in shown)]
    bare = ["base alone", "", *(number(evaluation.bare[measure.name].value) for measure in shown)]

    def row(entry: "Entry") -> list[str]:
        found = [entry.figures[measure.name] for measure in shown]
        mark = "→ " if entry is evaluation.best else ""
        figures = [f"{number(figure.value)} ({difference(figure)})" for figure in found]
        return [f"{mark}{entry.title}", entry.shares.verdict, *figures]

    rows = [head, bare, *map(row, evaluation.entries)]
    widths = [max(len(line[column]) for line in rows) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in rows]


def _named(sources: Sequence[str]) -> str:
    """Return the names of a few sources for the page's title."""
    names = [Path(source).name for source in sources]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _encoders(words: Sequence[str]) -> dict[str, str]:
    """Parse ``TASK=MODEL`` words."""
    from diffgraft.errors import DiffgraftError

    found = {}
    for word in words:
        task, equals, model = word.partition("=")
        if not equals or not task or not model:
            raise DiffgraftError(
                f"The encoder {word!r} cannot be read: write TASK=MODEL, such as clip=openai/clip-vit-large-patch14."
            )
        found[task] = model
    return found


def _numbers(text: str) -> list[float]:
    """Parse numbers with commas between."""
    from diffgraft.errors import DiffgraftError

    try:
        return [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise DiffgraftError(
            f"The strengths {text!r} cannot be read: write numbers with commas between, such as 0.6,0.8,1."
        ) from None


COMMANDS: tuple[Callable[..., None], ...] = (evaluate,)
