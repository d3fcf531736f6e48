"""What the tests of imports share: configurations written to files, and the recipes made of them, read again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffgraft.imports import convert_config, write_recipe
from diffgraft.imports.import_report import ImportReport
from diffgraft.trainers.recipe.recipe import Recipe

Made = tuple[Recipe, ImportReport]
Make = Callable[..., Made]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Contents of files, by name, in a folder of their own → the recipe and the report; mappings become JSON."""

    def made(**files: Any) -> Made:
        paths = []
        for name, content in files.items():
            path = tmp_path / name.replace("_", ".")
            path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
            paths.append(path)
        report = convert_config(paths)
        (tmp_path / "recipe.yaml").unlink(missing_ok=True)
        return write_recipe(report, tmp_path / "recipe.yaml", "test"), report

    return made


@pytest.fixture
def kohya_folder(tmp_path: Path) -> Path:
    """Five pictures in kohya's layout, which come eleven times an epoch, and two of the class."""
    for folder, count in (("img/3_sks dog", 3), ("img/1_sks cat", 2), ("reg/1_dog", 2)):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40, 24), (number * 20, 90, 200)).save(tmp_path / folder / f"{number}.png")
    return tmp_path


def told(report: ImportReport) -> dict[str, str]:
    """What is said of keys that have no counterpart, or not all of it."""
    return {line.key: line.note for line in report.dropped}
