"""Train every method on every target, and write the page about it.

``python -m benchmarks.learning --jobs 2`` takes more than an hour on two cores and may be stopped at any time: each
run's figures are added to a record as they come, and what stands there is not measured again. ``--photos FOLDER`` adds
the photographs of the DreamBooth data set, each in the folder of its subject.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.learning.report import RESULTS, write_page

METHODS = ("lora", "locon", "loha", "lokr", "full", "textual-inversion", "pivotal", "hypernetwork")
NO_PRIOR = "lora, without prior preservation"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in METHODS},
    NO_PRIOR: ("lora", {"prior.weight": "0"}),
}
"""Name in the table → method, and settings that differ from the recipe's."""
CLASSES = {"red_cartoon": "cartoon"}
"""Folder of photographs → class noun, where the folder's name is not the noun"""


@dataclass(frozen=True)
class Case:
    """One run: what is learnt, how, and with which seed."""

    target: str
    variant: str
    seed: int


def cases(seeds: int, photos: Path | None) -> Iterator[Case]:
    """All there are, those of the first seed first."""
    for seed in range(seeds):
        for target in ("poodle", "alien", "screen-print"):
            for variant in VARIANTS:
                if variant != NO_PRIOR or target != "screen-print":
                    yield Case(target, variant, seed)
        for folder in sorted(photos.iterdir()) if photos else ():
            if folder.is_dir():
                yield Case(folder.name, "lora", seed)


def work(case: Case, photos: Path | None, pictures: Path) -> dict[str, Any]:
    """Measure one case, in a process of its own."""
    from benchmarks.learning.measure import measure, save_new
    from benchmarks.learning.targets import made_up, of_photographs

    method, settings = VARIANTS[case.variant]
    known = made_up()
    if case.target in known:
        target = known[case.target]
    else:
        assert photos is not None
        target = of_photographs(photos / case.target, CLASSES.get(case.target, case.target))
    keep = pictures / case.target / case.variant if case.seed == 0 and target.new else None
    if keep is not None and not (before := keep.with_name("before")).exists():
        save_new(target, target.noun or "flat", before)
    return {**asdict(case), **measure(target, method, case.seed, settings, keep)}


def main() -> None:
    """Measure what is not in the record yet; then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with its share of the cores")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--record", type=Path, default=RESULTS / "learning.jsonl")
    parser.add_argument("--pictures", type=Path, default=Path("runs/learning"), help="folder for what is drawn")
    options = parser.parse_args()
    lines = options.record.read_text("utf-8").splitlines() if options.record.exists() else []
    done = {Case(row["target"], row["variant"], row["seed"]) for row in map(json.loads, lines)}
    todo = [case for case in cases(options.seeds, options.photos) if case not in done]
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.jobs))
    options.record.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context) as pool, tqdm(total=len(todo), desc="runs") as bar:
        running = [pool.submit(work, case, options.photos, options.pictures) for case in todo]
        for ended in as_completed(running):
            with options.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(ended.result()) + "\n")
            bar.update()
    write_page(options.record, options.pictures)


if __name__ == "__main__":
    main()
