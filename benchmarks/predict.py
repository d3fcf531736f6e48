"""Adapters predicted from pictures, then trained further: ``python -m benchmarks.predict``.

For each subject on which nothing was tuned, a LoRA is predicted from its five training pictures, and trained further
(`init_from`) for a third of the steps of the recipe `subject`. Beside it the recipe trains from scratch for as many
steps; its whole runs are those of the page of learning.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.learning.cases import UNSEEN
from benchmarks.learning.measure import known_loss, tiny, validation_sets
from benchmarks.learning.targets import Target, of_held_back
from diffgraft.adapters.adapter import Adapter
from diffgraft.files import write_text
from diffgraft.generation.graft import graft
from diffgraft.predictor.files import SHIPPED
from diffgraft.predictor.predict import predict_adapter
from diffgraft.trainers.run.train import train

PAGE = Path(__file__).parent / "results" / "predict.md"
WHOLE, PART = 400, 133
"""Steps of the recipe `subject`, whose runs the page of learning has, and the third of them that is compared"""
REFINED: dict[str, Any] = {"lr": 3e-3, "warmup": 5}
"""Settings of the training that goes on from a predicted adapter"""
HEAD = """# Adapters predicted from pictures

`python -m benchmarks.predict` wrote this page. {count} made-up subjects that nothing was tuned on have five training
pictures each. *Predicted*: `diffgraft predict` returns a LoRA for them. *Refined*: that LoRA is trained further on
them by the recipe `subject` with `init_from`, {settings}.
*From scratch*: the recipe alone; its whole runs are those of [the page of learning](learning.md).

*Gap closed* is the fall of the loss on the subject's pixels in held-out pictures, as a share of its excess over the
loss on things that the base knows: (mean before − mean after) / (mean before − known things) over the subjects.
*Without the trigger*: the fall under prompts without it, as a share of the fall with it. *Drift*: how far predictions
for pictures of the class move, in thousandths. *At least from scratch*: subjects whose loss is no higher than after
all {whole} steps from scratch. The seed is 0.

| | steps | gap closed | without the trigger | drift | at least from scratch |
|-|-|-|-|-|-|
"""
Row = dict[str, float]


def figures(target: Target, adapter: Adapter) -> Row:
    """Return the held-out losses of a subject with and without an adapter, and the drift of its class."""
    held_out, class_set, class_prompts = validation_sets(target)
    texts = [text.replace("{it}", f"sks {target.noun}") for text in target.texts]
    before = {"before": held_out.loss(tiny(), texts), "plain before": held_out.loss(tiny(), list(target.without))}
    bare = class_set.predict(tiny(), class_prompts)
    with graft(tiny(), {adapter: 1.0}):
        after = {"after": held_out.loss(tiny(), texts), "plain after": held_out.loss(tiny(), list(target.without))}
        return {**before, **after, "drift": class_set.prediction_drift(bare, tiny(), class_prompts)}


def work(predictor: Path, name: str) -> dict[str, Row]:
    """Return the figures of all trainings of a subject by their titles."""
    torch.set_num_threads(1)
    target = of_held_back(name)
    with tempfile.TemporaryDirectory() as folder:
        return {title: figures(target, adapter) for title, adapter in adapters(target, predictor, Path(folder))}


def adapters(target: Target, predictor: Path, folder: Path) -> Iterator[tuple[str, Adapter]]:
    """Yield the title and the adapter of each training of a subject."""
    common: dict[str, Any] = {"base": tiny(), "images": target.learn, "subject": target.noun}
    common |= {"previews": False, "seed": 0, "checkpoint_every": 0}
    predicted = predict_adapter(target.learn, tiny(), predictor)
    file = predicted.save(folder / "predicted.safetensors", "kohya")
    yield "predicted | 0", predicted
    run = train("subject", output=folder / "refined", steps=PART, init_from=file, **common, **REFINED)
    yield f"refined | {PART}", run.adapter
    run = train("subject", output=folder / "scratch", steps=PART, **common)
    yield f"from scratch | {PART}", run.adapter


def whole_runs() -> list[Row]:
    """Return the figures of the recipe's own runs from scratch, from the records of the page of learning."""
    records = [json.loads(line) for line in (PAGE.parent / "learning.jsonl").read_text("utf-8").splitlines()]
    own = {row["target"]: row for row in records if row["variant"] == "lora" and row["seed"] == 0}
    return [
        {
            "before": own[name]["before"],
            "after": own[name]["after"],
            "plain before": own[name]["gain without trigger"] * (own[name]["before"] - own[name]["after"]),
            "plain after": 0.0,
            "drift": own[name]["class drift"],
        }
        for name in UNSEEN
    ]


def line(title: str, rows: list[Row], whole: list[Row]) -> str:
    """Return the row of the table for one kind of training of all subjects."""
    mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
    fall = mean["before"] - mean["after"]
    gap, plain = fall / (mean["before"] - known_loss()), (mean["plain before"] - mean["plain after"]) / fall
    reached = sum(row["after"] <= best["after"] for row, best in zip(rows, whole, strict=True))
    return f"| {title} | {gap:.0%} | {plain:.0%} | {1000 * mean['drift']:.1f} | {reached} of {len(rows)} |"


def main() -> None:
    """Train, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--predictor", type=Path, default=SHIPPED, help="file of the predictor")
    parser.add_argument("--jobs", type=int, default=1, help="subjects at once")
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        found = list(tqdm(pool.imap(partial(work, options.predictor), UNSEEN), "subjects", len(UNSEEN)))
    write_text(PAGE, page(found))


def page(found: list[Mapping[str, Row]]) -> str:
    """Return the page as Markdown."""
    settings = "with `" + " ".join(f"{key}={value:g}" for key, value in REFINED.items()) + "`"
    whole = whole_runs()
    lines = [line(title, [rows[title] for rows in found], whole) for title in found[0]]
    lines.append(line(f"from scratch | {WHOLE}", whole, whole))
    return HEAD.format(count=len(found), settings=settings, whole=WHOLE) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
