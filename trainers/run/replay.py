"""Repeating the run that an adapter file is from, by the recipe in its header."""

import re
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from diffgraft.adapters.formats.header import read_metadata
from diffgraft.bases import Base
from diffgraft.data.picture_lists import save_picture_lists
from diffgraft.errors import DiffgraftError, one_line, wrap_system_errors
from diffgraft.trainers.objectives.registry import objectives
from diffgraft.trainers.recipe.recipe import TASKS
from diffgraft.trainers.run.folder import Run, adapter_file, new_run
from diffgraft.trainers.run.train import names_of, run_recipe

_OF_CONCEPT = re.compile(r"concepts\.(\d+)\.images")
"""Setting for the pictures of one of several concepts, which are counted from 0"""


@wrap_system_errors
def replay(adapter: str | Path, /, *, base: str | Path | Base = "", **settings: Any) -> Run:
    """Train again by the recipe in an adapter's header.

    With the same pictures, base, versions and machine, the new file has the same bytes. A header has no paths: the
    pictures, and a base other than `tiny`, have to be given, as have ``init_from``, ``under.adapter``,
    ``validation.images`` and ``prior.folder`` if the run had them.

    Args:
        adapter: an adapter file of diffgraft, or the folder of a run.
        base: as for `train`; by default the one of the header's name.
        settings: recipe keys as for `train`, ``images`` among them; of several concepts, ``concepts.0.images`` and so
            on.

    Returns:
        The new run.

    Raises:
        DiffgraftError: the file is missing or damaged, or its header has no recipe; or `train` refuses the recipe.
    """
    file = adapter_file(adapter)
    metadata = _header_of(file)
    values = _recipe_values(file, metadata)
    settings = _with_concept_images(values, save_picture_lists(settings))
    _check_missing(file, metadata, settings)
    if isinstance(base, str | Path) and not str(base):
        base = _base_name(file, metadata, settings)
    for remark in _remarks(metadata):
        warnings.warn(remark, stacklevel=3)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / f"{_stem(file)}.yaml"
        saved.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), "utf-8")
        planned = new_run(saved, settings | names_of(base))
    return run_recipe(planned, base, expected=_expected(metadata))


def _header_of(file: Path) -> dict[str, Any]:
    """Return the metadata in the header of an adapter file.

    Raises:
        DiffgraftError: it is not a safetensors file with a readable header.
    """
    try:
        with safe_open(file, "pt") as opened:
            return read_metadata(opened.metadata() or {})
    except (OSError, SafetensorError, ValueError) as error:
        raise DiffgraftError(f"{file} is not a readable safetensors file ({one_line(error, 100)}).") from error


def _recipe_values(file: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe in a header; raises DiffgraftError if there is none of a known task."""
    recipe = metadata.get("recipe")
    if not isinstance(recipe, Mapping) or recipe.get("task") not in TASKS:
        raise DiffgraftError(
            f"The header of {file} has no recipe to repeat: only files that diffgraft has trained have one, and some "
            "formats of other tools drop it."
        )
    return dict(recipe)


def _with_concept_images(values: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put the pictures of single concepts into the recipe's `values`; return the other settings.

    Raises:
        DiffgraftError: the recipe has no such concept, or a concept is left without pictures.
    """
    known, others = values.get("concepts") or [], dict(settings)
    for key in [key for key in others if _OF_CONCEPT.fullmatch(key)]:
        index = int(key.split(".")[1])
        if index >= len(known):
            raise DiffgraftError(f"Unknown setting {key}: the recipe has {len(known)} concepts, counted from 0.")
        known[index]["images"] = str(others.pop(key))
    if "concepts" not in others and (missing := [str(at) for at, own in enumerate(known) if not own.get("images")]):
        keys = " ".join(f"concepts.{at}.images=FOLDER" for at in missing)
        raise DiffgraftError(f"The recipe has {len(known)} concepts, and a header has no paths: add {keys}.")
    return others


def _check_missing(file: Path, metadata: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise DiffgraftError if the run needed files that the settings do not name."""
    under = settings.get("under")
    has_under = bool(settings.get("under.adapter") or (isinstance(under, Mapping) and under.get("adapter")))
    if metadata.get("under") and not has_under:
        raise DiffgraftError(f"{file} was trained with an adapter under it: add under.adapter=FILE.")
    if metadata.get("init_from") and not settings.get("init_from"):
        raise DiffgraftError(f"{file} was trained from another adapter: add init_from=FILE.")
    loss = metadata["recipe"].get("loss") or {}
    objective = objectives().get(loss.get("objective", "") if isinstance(loss, Mapping) else "")
    draws = objective is not None and objective.draws_pictures
    if not (draws or settings.get("images") or settings.get("concepts") or metadata["recipe"].get("concepts")):
        raise DiffgraftError("A header does not hold the pictures that the run was trained on: add images=FOLDER.")


def _base_name(file: Path, metadata: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the name of the base in a header; raises DiffgraftError if it cannot be found by its name."""
    told = metadata.get("base")
    name = str(told.get("name", "")) if isinstance(told, Mapping) else ""
    if settings.get("base"):
        return str(settings["base"])
    if name != "tiny":
        named = f", {name}," if name else ""
        raise DiffgraftError(f"A header has only the name of the base{named} of {file}: add base=PATH or base=HUB-ID.")
    return name


def _remarks(metadata: Mapping[str, Any]) -> list[str]:
    """Return reasons why the new file may differ, other than its inputs."""
    remarks = []
    versions = metadata.get("versions")
    for name, known in versions.items() if isinstance(versions, Mapping) else ():
        if (current := _version(name)) != known:
            remarks.append(f"{name} {known}, now {current}")
    found = [f"The run used other versions: {', '.join(remarks)}. The result may differ."] if remarks else []
    if metadata.get("changes"):
        found.append("The run was resumed with other settings, of which only the last are repeated: it will differ.")
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except (PackageNotFoundError, ValueError):
        return "not installed"


def _expected(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes in a header that the new run should have."""
    told = metadata.get("base")
    base = told.get("hash") if isinstance(told, Mapping) else None
    start, under = metadata.get("init_from"), metadata.get("under")
    known = {"data": metadata.get("data"), "base": base, "start": start, "under": under}
    return {entry: value for entry, value in known.items() if isinstance(value, str) and value}


def _stem(file: Path) -> str:
    """Return a name for the new run: that of the file, or of the folder of its run."""
    return file.parent.resolve().name if file.name == "adapter.safetensors" else file.stem
