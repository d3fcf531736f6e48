"""OneTrainer's concepts: their folders, repeats, prompts, and the settings that all of them share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffgraft.errors import DiffgraftError
from diffgraft.imports.counting import count_pictures
from diffgraft.imports.import_report import ImportReport, as_number
from diffgraft.imports.onetrainer_keys import CONCEPT, CONCEPT_IMAGE, CONCEPT_TEXT, DEFAULTS
from diffgraft.imports.reading import find_file, read_config, read_text

_PER_CONCEPT = (
    "name",
    "path",
    "seed",
    "enabled",
    "type",
    "balancing",
    "balancing_strategy",
    "loss_weight",
    "concept_stats",
)
"""Settings with a value for each concept, or without effect"""
_WORDS = ("prompt_source", "prompt_path")


@dataclass
class Concepts:
    """The training and validation concepts of a configuration."""

    folders: list[str] = field(default_factory=list)
    pictures: int | None = None
    """Number of images in an epoch; None if unknown"""
    held_out: list[str] = field(default_factory=list)
    prompts: list[str | None] = field(default_factory=list)
    """For each folder the prompt of all its images; None if they have captions"""


def read_concepts(report: ImportReport, file: Path, given: Sequence[Any] | None) -> Concepts:
    """Map the concepts; settings that all of them share are added to the report's values.

    Raises:
        DiffgraftError: they do not have the structure of OneTrainer's concepts.
    """
    listed = _listed(report, file, given)
    found = Concepts()
    entries: list[dict[str, Any]] = []
    counts: list[int | None] = []
    for concept in listed:
        kind, path = str(concept.get("type") or "STANDARD"), str(concept.get("path") or "")
        name = str(concept.get("name") or path)
        if concept.get("enabled") is False:
            report.drop_part(f"concept {name}, enabled", False, "the concept is disabled and was skipped.")
        elif kind == "VALIDATION":
            found.held_out.append(path)
        elif kind == "PRIOR_PREDICTION":
            why = "not supported; prior.by=prediction preserves the base's predictions on the training images."
            report.drop_part(f"concept {name}, type", kind, why)
        else:
            entry, count = _entry(report, concept, name, path, file)
            entries.append(entry)
            counts.append(count)
            found.folders.append(path)
            found.prompts.append(_prompt(report, concept, name, file))
    if counts and all(count is not None for count in counts):
        found.pictures = sum(count for count in counts if count is not None)
    _share(report, [concept for concept in listed if str(concept.get("path") or "") in found.folders])
    _put(report, entries, found)
    return found


def _listed(report: ImportReport, file: Path, given: Sequence[Any] | None) -> list[dict[str, Any]]:
    concepts: Any = given if given is not None else report.values.pop("concepts", None)
    name = report.text("concept_file_name")
    if concepts is None and (path := find_file(name, file)) is not None:
        concepts = read_config(path)
    elif concepts is None:
        report.drop("concept_file_name", "the file was not found: give it on the command line as well.")
    concepts = [] if concepts is None else concepts
    if not isinstance(concepts, list) or not all(isinstance(concept, dict) for concept in concepts):
        raise DiffgraftError("OneTrainer's concepts must be a list of objects, each with a path.")
    return [_with_current_names(concept) for concept in concepts]


def _with_current_names(concept: dict[str, Any]) -> dict[str, Any]:
    """A concept with the current names of settings that older versions called something else."""
    version = as_number("__version", concept.get("__version")) or 0
    current = dict(concept)
    if version < 1 and "repeats" in current:
        current["balancing"] = current.pop("repeats")
    if version < 2 and "validation_concept" in current:
        current["type"] = "VALIDATION" if current.pop("validation_concept") else "STANDARD"
    return current


def _entry(
    report: ImportReport, concept: Mapping[str, Any], name: str, path: str, file: Path
) -> tuple[dict[str, Any], int | None]:
    """Entry of the recipe's `concepts`, and the number of its images in an epoch, None if unknown."""
    balancing = as_number("balancing", concept.get("balancing", 1.0)) or 0.0
    by_samples = str(concept.get("balancing_strategy") or "REPEATS") == "SAMPLES"
    entry: dict[str, Any] = {"images": path}
    if not by_samples and balancing.is_integer() and balancing >= 1:
        entry["repeats"] = int(balancing)
    else:
        why = "repeats must be an integer: set it by hand."
        report.drop_part(f"concept {name}, balancing", balancing, why)
    if (weight := as_number("loss_weight", concept.get("loss_weight", 1.0))) not in (None, 1.0):
        entry["weight"] = weight
    count = count_pictures(find_file(path, file))
    if by_samples:
        return entry, int(balancing)
    return entry, None if count is None or concept.get("include_subdirectories") else round(count * balancing)


def _prompt(report: ImportReport, concept: Mapping[str, Any], name: str, file: Path) -> str | None:
    text = concept.get("text")
    text = text if isinstance(text, dict) else {}
    source = str(text.get("prompt_source") or "sample")
    if source == "sample":
        return None
    where = f"concept {name}, text.prompt_source"
    path = find_file(str(text.get("prompt_path") or ""), file)
    if source == "concept" and path is not None and path.is_file():
        lines = [line for line in read_text(path).splitlines() if line.strip()]
        if len(lines) == 1:
            return lines[0].strip()
    report.drop_part(where, source, "captions are read from .txt files, or a folder has one prompt: write .txt files.")
    return None


def _share(report: ImportReport, concepts: Sequence[Mapping[str, Any]]) -> None:
    """Set the keys that have a single value in a recipe, if the concepts agree on it; drop them otherwise."""
    groups = {"": CONCEPT - {"image", "text"}, "image.": CONCEPT_IMAGE, "text.": CONCEPT_TEXT}
    values_by_key: dict[str, list[Any]] = {}
    for row, concept in enumerate(concepts):
        for prefix, known in groups.items():
            group = concept if not prefix else concept.get(prefix[:-1])
            for key, value in group.items() if isinstance(group, dict) else ():
                if key in known and key not in (*_PER_CONCEPT, *_WORDS):
                    values_by_key.setdefault(prefix + key, [None] * len(concepts))[row] = value
                elif key not in known | {"__version", "image", "text"}:
                    report.drop_part(f"concepts.{prefix}{key}", value, "not a known key of concepts.")
    for key, values in values_by_key.items():
        full = f"concepts.{key}"
        default = DEFAULTS.get(full)
        filled = [default if value is None else value for value in values]
        if any(value != filled[0] for value in filled):
            report.drop_part(
                full,
                " and ".join(map(str, filled)),
                "differs between the concepts, but a recipe has a single value: set it by hand.",
            )
        elif full in DEFAULTS:
            report.values[full] = filled[0]


def _put(report: ImportReport, entries: list[dict[str, Any]], found: Concepts) -> None:
    """Write a single concept to top-level keys of the recipe, and several to its `concepts` list."""
    if len(entries) == 1:
        for key, value in entries[0].items():
            theirs = {"images": "path", "repeats": "balancing", "weight": "loss_weight"}[key]
            report.map_part(key, value, f"concept {theirs}", value)
    elif entries:
        report.map_part("concepts", entries, "concepts", ", ".join(found.folders))
    if not entries or not all(found.folders):
        report.todo("images", "the folder with the images.")
