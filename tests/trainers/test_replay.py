"""A run is repeated by the recipe in its adapter's header, to the same bytes; what is missing is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffgraft.bases import Base
from diffgraft.demo.subject import ALIEN
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.replay import replay

QUIET: dict[str, Any] = {"previews": False}
"""Setting that no header has"""


def with_metadata(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of an adapter with other entries in its metadata; None removes one."""
    with safe_open(source, "pt") as file:
        header = file.metadata()
    metadata = {
        key: value for key, value in {**json.loads(header["diffgraft"]), **changes}.items() if value is not None
    }
    save_file(load_file(source), target, {**header, "diffgraft": json.dumps(metadata)})
    return target


@pytest.fixture(scope="module")
def again(short_run: Run, base: Base, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The short run repeated, by its file alone."""
    folder = tmp_path_factory.mktemp("replay") / "again"
    return replay(short_run.adapter_file, base=base, images=pictures, output=folder, **QUIET)


def test_the_same_pictures_give_the_same_bytes(short_run: Run, again: Run) -> None:
    assert again.adapter_file.read_bytes() == short_run.adapter_file.read_bytes()
    assert again.metrics == short_run.metrics


def test_other_pictures_are_told_before_they_are_trained_on(short_run: Run, base: Base, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the pictures or their captions differ. The result will differ"):
        other = replay(short_run.folder, base=base, images=ALIEN.folder / "learn", output=tmp_path / "run", **QUIET)
    assert other.adapter_file.read_bytes() != short_run.adapter_file.read_bytes()


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"recipe": None}, {}, "has no recipe to repeat"),
        ({"recipe": {"task": "none"}}, {}, "has no recipe to repeat"),
        ({}, {"images": None}, "add images=FOLDER"),
        ({"under": "5f"}, {}, "add under.adapter=FILE"),
        ({"init_from": "5f"}, {}, "add init_from=FILE"),
        ({"base": {"name": "sd15"}}, {}, "has only the name of the base, sd15, of .*: add base=PATH"),
        ({"recipe": {"task": "subject", "subject": "dog", "stpes": 3}}, {}, "Unknown setting 'stpes'"),
        ({"recipe": {"task": "style", "concepts": [{"trigger": "a"}]}}, {}, r"add concepts\.0\.images=FOLDER"),
        ({}, {"concepts.1.images": "x"}, "the recipe has 0 concepts"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(
    changes: dict[str, Any], settings: dict[str, Any], message: str, short_run: Run, pictures: Path, tmp_path: Path
) -> None:
    file = with_metadata(short_run.adapter_file, tmp_path / "dog.safetensors", **changes)
    given = {key: value for key, value in {"images": pictures, **settings}.items() if value is not None}
    with pytest.raises(DiffgraftError, match=message):
        replay(file, **given)


def test_files_that_are_no_adapters_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no adapter", "utf-8")
    for name, message in (("text.safetensors", "not a readable safetensors file"), ("none", "There is no adapter at")):
        with pytest.raises(DiffgraftError, match=message):
            replay(tmp_path / name, images=tmp_path)


def test_other_versions_are_told(short_run: Run, pictures: Path, tmp_path: Path) -> None:
    versions = {"torch": "1.0", "none-of-ours": "2"}
    file = with_metadata(short_run.adapter_file, tmp_path / "dog.safetensors", versions=versions)
    with (
        pytest.warns(UserWarning, match=r"other versions: torch 1\.0, now .*, none-of-ours 2, now not installed"),
        pytest.raises(DiffgraftError, match="lr"),
    ):
        replay(file, images=pictures, lr=-1)
