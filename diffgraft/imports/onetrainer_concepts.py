"""OneTrainer's concepts: folders, how often their pictures come, where their words are, and what all of them share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffgraft.errors import DiffgraftError
from diffgraft.imports.account import Account, as_number
from diffgraft.imports.counting import count_pictures
from diffgraft.imports.onetrainer_keys import CONCEPT, CONCEPT_IMAGE, CONCEPT_TEXT, DEFAULTS
from diffgraft.imports.reading import beside, read_config, read_text

_OWN = ("name", "path", "seed", "enabled", "type", "balancing", "balancing_strategy", "loss_weight", "concept_stats")
"""What each concept has of its own, or what has no effect"""
_WORDS = ("prompt_source", "prompt_path")


@dataclass
class Concepts:
    """Those that are learnt from, and those that are looked at."""

    folders: list[str] = field(default_factory=list)
    pictures: int | None = None
    """In an epoch; None where it is not known"""
    held_out: list[str] = field(default_factory=list)
    prompts: list[str | None] = field(default_factory=list)
    """For each folder the prompt of all its pictures; None: captions beside them"""


def read_concepts(account: Account, file: Path, given: Sequence[Any] | None) -> Concepts:
    """The concepts, put on the account: folders, repeats and weights each, and what all share among its given keys.

    Raises:
        DiffgraftError: they are not laid out as OneTrainer's.
    """
    listed = _listed(account, file, given)
    found = Concepts()
    entries: list[dict[str, Any]] = []
    counts: list[int | None] = []
    for concept in listed:
        kind, path = str(concept.get("type") or "STANDARD"), str(concept.get("path") or "")
        name = str(concept.get("name") or path)
        if concept.get("enabled") is False:
            account.aside(f"concept {name}, enabled", False, "it is left out.")
        elif kind == "VALIDATION":
            found.held_out.append(path)
        elif kind == "PRIOR_PREDICTION":
            why = "what the base says is preserved on the concept's own pictures here: prior.by=prediction."
            account.aside(f"concept {name}, type", kind, why)
        else:
            entry, count = _entry(account, concept, name, path, file)
            entries.append(entry)
            counts.append(count)
            found.folders.append(path)
            found.prompts.append(_prompt(account, concept, name, file))
    if counts and all(count is not None for count in counts):
        found.pictures = sum(count for count in counts if count is not None)
    _share(account, [one for one in listed if str(one.get("path") or "") in found.folders])
    _put(account, entries, found)
    return found


def _listed(account: Account, file: Path, given: Sequence[Any] | None) -> list[dict[str, Any]]:
    said: Any = given if given is not None else account.given.pop("concepts", None)
    named = account.text("concept_file_name")
    if said is None and (path := beside(named, file)) is not None:
        said = read_config(path)
    elif said is None:
        account.lose(
            "concept_file_name", "there is no such file, from here or beside the configuration: give it as well."
        )
    said = [] if said is None else said
    if not isinstance(said, list) or not all(isinstance(one, dict) for one in said):
        raise DiffgraftError("OneTrainer's concepts should be a list, each with a path.")
    return [_renewed(one) for one in said]


def _renewed(concept: dict[str, Any]) -> dict[str, Any]:
    """With today's names for what older versions called something else."""
    version = as_number("__version", concept.get("__version")) or 0
    found = dict(concept)
    if version < 1 and "repeats" in found:
        found["balancing"] = found.pop("repeats")
    if version < 2 and "validation_concept" in found:
        found["type"] = "VALIDATION" if found.pop("validation_concept") else "STANDARD"
    return found


def _entry(
    account: Account, concept: Mapping[str, Any], name: str, path: str, file: Path
) -> tuple[dict[str, Any], int | None]:
    """A concept of ours, and how many pictures it has in an epoch."""
    balancing = as_number("balancing", concept.get("balancing", 1.0)) or 0.0
    by_samples = str(concept.get("balancing_strategy") or "REPEATS") == "SAMPLES"
    entry: dict[str, Any] = {"images": path}
    if not by_samples and balancing.is_integer() and balancing >= 1:
        entry["repeats"] = int(balancing)
    else:
        why = "a picture comes a whole number of times in a round here: set `repeats`."
        account.aside(f"concept {name}, balancing", balancing, why)
    if (weight := as_number("loss_weight", concept.get("loss_weight", 1.0))) not in (None, 1.0):
        entry["weight"] = weight
    count = count_pictures(beside(path, file))
    if by_samples:
        return entry, int(balancing)
    return entry, None if count is None or concept.get("include_subdirectories") else round(count * balancing)


def _prompt(account: Account, concept: Mapping[str, Any], name: str, file: Path) -> str | None:
    text = concept.get("text")
    text = text if isinstance(text, dict) else {}
    source = str(text.get("prompt_source") or "sample")
    if source == "sample":
        return None
    where = f"concept {name}, text.prompt_source"
    path = beside(str(text.get("prompt_path") or ""), file)
    if source == "concept" and path is not None and path.is_file():
        lines = [line for line in read_text(path).splitlines() if line.strip()]
        if len(lines) == 1:
            return lines[0].strip()
    account.aside(where, source, "captions are read from .txt files, or there is one prompt for a folder: write them.")
    return None


def _share(account: Account, concepts: Sequence[Mapping[str, Any]]) -> None:
    """What is one for all here, where the concepts agree on it."""
    groups = {"": CONCEPT - {"image", "text"}, "image.": CONCEPT_IMAGE, "text.": CONCEPT_TEXT}
    said: dict[str, list[Any]] = {}
    for row, concept in enumerate(concepts):
        for prefix, known in groups.items():
            group = concept if not prefix else concept.get(prefix[:-1])
            for key, value in group.items() if isinstance(group, dict) else ():
                if key in known and key not in (*_OWN, *_WORDS):
                    said.setdefault(prefix + key, [None] * len(concepts))[row] = value
                elif key not in known | {"__version", "image", "text"}:
                    account.aside(f"concepts.{prefix}{key}", value, "no key of concepts that is known here.")
    for key, values in said.items():
        full = f"concepts.{key}"
        default = DEFAULTS.get(full)
        filled = [default if value is None else value for value in values]
        if any(value != filled[0] for value in filled):
            account.aside(full, " and ".join(map(str, filled)), "it differs, and is one for all here: set it by hand.")
        elif full in DEFAULTS:
            account.given[full] = filled[0]


def _put(account: Account, entries: list[dict[str, Any]], found: Concepts) -> None:
    """One concept as the recipe's own keys, several as `concepts`."""
    if len(entries) == 1:
        for key, value in entries[0].items():
            theirs = {"images": "path", "repeats": "balancing", "weight": "loss_weight"}[key]
            account.take_part(key, value, f"concept {theirs}", value)
    elif entries:
        account.take_part("concepts", entries, "concepts", ", ".join(found.folders))
    if not entries or not all(found.folders):
        account.ask("images", "the folder with the pictures.")
