"""Train every method on every target, and write the page of results.

``python -m benchmarks.learning --jobs 2`` takes more than an hour on two cores. It may be stopped at any time: the
figures of each finished run are appended to a record, and runs in the record are skipped. ``--photos FOLDER`` adds the
photographs of the DreamBooth data set, with one folder for each subject. Delete the record where a recipe has changed.
"""

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from benchmarks.learning.cases import VARIANTS, Case, cases, work
from benchmarks.learning.report import RESULTS, write_page


def main() -> None:
    """Measure all cases that are not in the record yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs, which share the cores")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--record", type=Path, default=RESULTS / "learning.jsonl")
    parser.add_argument(
        "--pictures", type=Path, default=Path("runs/learning"), help="folder for the generated pictures"
    )
    options = parser.parse_args()
    lines = options.record.read_text("utf-8").splitlines() if options.record.exists() else []
    rows = [json.loads(line) for line in lines]
    if unknown := {row["variant"] for row in rows} - set(VARIANTS):
        sys.exit(f"{options.record} has runs of {', '.join(sorted(unknown))}, which are no cases any more: delete it.")
    done = {Case(row["target"], row["variant"], row["seed"]) for row in rows}
    todo = [case for case in cases(options.seeds, options.photos) if case not in done]
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.jobs))
    options.record.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    failed: list[str] = []
    with ProcessPoolExecutor(options.jobs, context) as pool, tqdm(total=len(todo), desc="runs") as bar:
        running = {pool.submit(work, case, options.photos, options.pictures): case for case in todo}
        try:
            for ended in as_completed(running):
                if error := ended.exception():
                    failed.append(f"{running[ended]}: {error!r}")
                else:
                    with options.record.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(ended.result()) + "\n")
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        sys.exit("No page was written, because these runs failed:\n" + "\n".join(failed))
    write_page(options.record, options.pictures)


if __name__ == "__main__":
    main()
