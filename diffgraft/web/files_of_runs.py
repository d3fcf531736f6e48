"""Where the studio keeps what it knows of a run: a folder `studio` in the folder of the run."""

from pathlib import Path

FOLDER = "studio"


def events_file(run: Path) -> Path:
    """Path of the events of a run's trainings, one JSON object a line."""
    return run / FOLDER / "events.jsonl"


def process_file(run: Path) -> Path:
    """Path of the note on the process that trains, or trained last."""
    return run / FOLDER / "process.json"


def output_file(run: Path) -> Path:
    """Path of what the trainings printed."""
    return run / FOLDER / "output.txt"
