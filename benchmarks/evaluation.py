"""Whether `evaluate` ranks adapters and picks strengths as the judge does: ``python -m benchmarks.evaluation``.

First the tiny world draws what adapters would draw that have learned too little, well, or by heart. Then, for each
seed, a subject and a style are trained, and once more far too hard and without prior preservation. Adapters of the
first steps have learned too little, the last ones are good, and those of the other run are overcooked. `evaluate` sees
pictures by the CLIP of `tiny`. The judge of `tiny`, which shares nothing with it, says by other pictures which strength
of the good ones is best. A trained seed takes some minutes on a core; figures of finished seeds are kept in a record,
so that it may be stopped at any time.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning.measure import TRIGGER, tiny, verdicts
from benchmarks.learning.targets import Target, made_up
from benchmarks.planted import PLANTED as DRAWN
from benchmarks.planted import is_right, planted_shares, targets
from diffgraft.evaluation.encoders import Encoders
from diffgraft.evaluation.evaluate import Evaluation, evaluate
from diffgraft.evaluation.measure import ENCODERS
from diffgraft.evaluation.verdict import Outcome, recommend
from diffgraft.files import write_text
from diffgraft.generation.plots import grid, save_image
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.progress import reporting, silent
from diffgraft.trainers.run.train import train

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent / "pictures"
EARLY = 10
"""Step after which an adapter has learned too little"""
GRID = tuple(round(0.1 * place, 1) for place in range(6, 14))
"""Strengths among which the best is searched"""
SEEDS = 3
"""Pictures of each prompt that `evaluate` and the judge see"""
JUDGE_SEED = 9_000
DRAWING = DrawSettings(steps=12)
VERDICTS = ("too little", "good", "overcooked")


@dataclass(frozen=True)
class Planted:
    """How the adapters of a target are trained."""

    target: str
    good: Mapping[str, Any]
    hard: Mapping[str, Any]
    prompts: Sequence[str]
    """Prompts of the evaluation, of other scenes than the judge's"""


_HARD = {"steps": 120, "lr": 6e-3, "lr_schedule": "constant", "warmup": 0, "batch": 2, "prior.weight": 0}
PLANTED = {
    "alien": Planted(
        "alien",
        {"steps": 150, "subject": "robot"},
        {**_HARD, "subject": "robot"},
        ("a sks robot in the desert", "a sks robot on the beach", "a sks robot under water", "a robot on the beach"),
    ),
    "screen-print": Planted(
        "screen-print",
        {"steps": 100, "prior.by": "prediction"},
        _HARD,
        (
            "a dog on the grass, sks style",
            "a house in the snow, sks style",
            "a teapot in the kitchen, sks style",
            "a teapot in the kitchen",
        ),
    ),
}


def trained(planted: Planted, target: Target, seed: int, folder: Path) -> dict[str, Path]:
    """Train both runs; return verdict → adapter."""
    common = {"base": tiny(), "images": target.learn, "seed": seed, "previews": False, "sample_every": 0}
    good, hard = folder / "good", folder / "hard"
    for output, settings, every in ((good, planted.good, EARLY), (hard, planted.hard, 0)):
        train(target.recipe, output=output, adapter_every=every, checkpoint_every=0, **common, **settings)
    files = (
        good / "adapters" / f"step-{EARLY:06d}.safetensors",
        *(run / "adapter.safetensors" for run in (good, hard)),
    )
    return dict(zip(VERDICTS, files, strict=True))


def judged(target: Target, adapter: Path, strength: float, words: str) -> dict[str, float]:
    """Return the judge's verdicts on pictures of an adapter at a strength, by prompts that are new to it."""
    with Session(tiny()) as session:
        session.use(adapter, strength, "judged")
        seeds = range(JUDGE_SEED, JUDGE_SEED + SEEDS)
        few = target.new[:3]
        return verdicts([(new, session.draw(new.text.replace("{it}", words), seeds, DRAWING)) for new in few])


def measure(name: str, seed: int, pictures: bool = False) -> dict[str, Any]:
    """Return the record of one seed of a target."""
    planted, target = PLANTED[name], made_up()[name]
    words = f"{TRIGGER} {target.noun}".strip()
    with tempfile.TemporaryDirectory() as place, reporting(silent):
        folder = Path(place)
        files = trained(planted, target, seed, folder)
        options: dict[str, Any] = {
            "base": tiny(),
            "images": target.learn,
            "prompts": planted.prompts,
            "trigger": TRIGGER,
            "subject": target.noun,
            "seeds": SEEDS,
            "settings": DRAWING,
            "output": folder / "evaluation",
        }
        alone = {wanted: evaluate(file, strengths=[1.0], **options) for wanted, file in files.items()}
        strengths = evaluate(files["good"], strengths=GRID, **options)
        truth = {str(strength): judged(target, files["good"], strength, words) for strength in GRID}
        others = {wanted: judged(target, files[wanted], 1.0, words) for wanted in ("too little", "overcooked")}
        if pictures:
            sheet = grid({wanted: _row(found) for wanted, found in alone.items()})
            save_image(sheet, PICTURES / f"evaluation-{name}.png")
    return {
        "target": name,
        "seed": seed,
        "shares": {wanted: asdict(found.entries[0].shares) for wanted, found in alone.items()},
        "by strength": [asdict(entry.shares) for entry in strengths.entries],
        "judged": {"good": truth["1.0"], **others},
        "truth": [found["similarity"] for found in truth.values()],
    }


@dataclass(frozen=True)
class Outcome:
    """What `evaluate` and the judge say of one seed."""

    target: str
    seed: int
    shares: Mapping[str, Outcome]
    """Verdict that was planted → shares of the adapter"""
    picked: float
    """Recommended strength of the good one"""
    best: float
    """Best strength by the judge"""
    lost: float
    """Similarity by the judge that the recommended strength has less than the best"""
    judged: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Outcome":
        """Return the outcome of a record, by the present limits of verdicts."""
        curve, truth = [Outcome(**shares) for shares in row["by strength"]], row["truth"]
        best = int(np.argmax(np.polyval(np.polyfit(GRID, truth, 2), GRID)))  # a parabola, as pictures are few
        picked = recommend([str(strength) for strength in GRID], GRID, curve).index
        lost = truth[best] - truth[picked]
        return cls(row["target"], row["seed"], _shares(row["shares"]), GRID[picked], GRID[best], lost, row["judged"])

    @property
    def is_right(self) -> bool:
        """Whether all verdicts are right."""
        return all(wanted == found.verdict for wanted, found in self.shares.items())

    @property
    def is_ranked(self) -> bool:
        """Whether the good one has the best score."""
        return max(self.shares, key=lambda wanted: self.shares[wanted].score) == "good"

    @property
    def is_near(self) -> bool:
        """Whether the recommended strength is within 0.1 of the best."""
        return abs(self.picked - self.best) < 0.101


def _shares(found: Mapping[str, Any]) -> dict[str, Outcome]:
    return {name: Outcome(**shares) for name, shares in found.items()}


def _row(found: Evaluation) -> list[Any]:
    return [image for row in found.entries[0].drawn.trained for image in row]


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of results."""
    lines = [
        "# Evaluation against planted adapters",
        "",
        "`python -m benchmarks.evaluation` wrote this page. What `evaluate` says, by the CLIP of `tiny`, is held",
        "against what was planted.",
        "",
        "## Pictures of the world",
        "",
        *_paragraph(
            "The tiny world itself draws what adapters would draw, three or four prompts with four seeds each: *too "
            "little* (one picture in ten shows what was to be learned), *good*, *by heart* (the scenes of training "
            "pictures whatever the prompt asks, and without the trigger too) and *leaks* (good, but also without the "
            "trigger). Likeness and following are means over the seeds."
        ),
        "",
        "| target | all verdicts right, good ranked first | "
        + " | ".join(f"{name}: likeness, following" for name in DRAWN)
        + " |",
        f"|-|-|{'-|' * len(DRAWN)}",
    ]
    for target in targets():
        drawn = [_shares(row["drawn"]) for row in rows if row["target"] == target and "drawn" in row]
        if drawn:
            cells = [target, f"{sum(map(is_right, drawn))} of {len(drawn)}"]
            for name in DRAWN:
                means = [np.mean([getattr(one[name], key) for one in drawn]) for key in ("likeness", "following")]
                cells.append(", ".join(f"{mean:.2f}" for mean in means))
            lines.append(f"| {' | '.join(cells)} |")
    outcomes = [Outcome.of(row) for row in rows if "truth" in row]
    outcomes.sort(key=lambda outcome: (outcome.target, outcome.seed))
    return "\n".join([*lines, *(_trained_lines(outcomes) if outcomes else [])]) + "\n"


def _paragraph(text: str, indent: str = "") -> list[str]:
    """Return the lines of a paragraph of the page."""
    return textwrap.wrap(text, 118, subsequent_indent=indent, break_on_hyphens=False)


def _trained_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the part of the page on trained adapters."""
    lines = [
        "",
        "## Trained adapters",
        "",
        *_paragraph(
            f"For each seed, adapters that have learned too little (step {EARLY}), well, and far too much (without "
            "prior preservation, at a high learning rate) were trained on `tiny`. `evaluate` saw pictures of some "
            "prompts with three seeds each. The judge of `tiny` saw other prompts and seeds."
        ),
        "",
        "- *verdicts*: seeds in which all verdicts are right. *ranked*: in which the good one has the best score.",
        *_paragraph(
            "- *strength*: seeds in which the recommended strength of the good one is within 0.1 of the best by the "
            "similarity that the judge sees (a parabola through eight strengths). *lost*: similarity that the "
            "recommended one has less than the best one, mean and largest.",
            "  ",
        ),
        "- *shown*: share of pictures in which the judge sees subject or style and what the prompt asks.",
        "",
        "| target | seeds | verdicts | ranked | strength | lost | shown: too little | good | overcooked |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for target in PLANTED:
        own = [outcome for outcome in outcomes if outcome.target == target]
        if not own:
            continue
        counts = [sum(kind) for kind in zip(*((one.is_right, one.is_ranked, one.is_near) for one in own), strict=True)]
        lost = [outcome.lost for outcome in own]
        shown = [np.mean([outcome.judged[wanted]["shown as asked"] for outcome in own]) for wanted in VERDICTS]
        cells = [target, str(len(own)), *(f"{count} of {len(own)}" for count in counts)]
        cells += [f"{np.mean(lost):.3f}, {max(lost):.3f}", *(f"{share:.0%}".replace("%", " %") for share in shown)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| target | seed | verdicts | likeness, following | recommended | best |", "|-|-|-|-|-|-|"]
    for outcome in outcomes:
        found = ", ".join(outcome.shares[wanted].verdict for wanted in VERDICTS)
        both = [f"{outcome.shares[name].likeness:.2f}, {outcome.shares[name].following:.2f}" for name in VERDICTS]
        cells = [outcome.target, str(outcome.seed), found, " · ".join(both), f"{outcome.picked:g}", f"{outcome.best:g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure all seeds that are not in the record yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="seeds of pictures of the world")
    parser.add_argument("--trained", type=int, default=10, help="seeds of trained adapters")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs, which share the cores")
    parser.add_argument("--record", type=Path, default=RESULTS / "evaluation.jsonl")
    options = parser.parse_args()
    lines = options.record.read_text("utf-8").splitlines() if options.record.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["target"], row["seed"], "truth" in row) for row in rows}

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        options.record.parent.mkdir(parents=True, exist_ok=True)
        with options.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        write_text(RESULTS / "evaluation.md", page(rows))

    encoders = Encoders(dict.fromkeys(ENCODERS, "tiny"))
    for target, seed in [(target, seed) for target in targets() for seed in range(options.seeds)]:
        if (target, seed, False) not in done:
            shares = planted_shares(target, seed, encoders)
            keep({"target": target, "seed": seed, "drawn": {name: asdict(found) for name, found in shares.items()}})
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.jobs))
    todo = [(name, seed) for seed in range(options.trained) for name in PLANTED if (name, seed, True) not in done]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(measure, name, seed, seed == 0) for name, seed in todo]
        for ended in as_completed(running):
            keep(ended.result())
    write_text(RESULTS / "evaluation.md", page(rows))


if __name__ == "__main__":
    main()
