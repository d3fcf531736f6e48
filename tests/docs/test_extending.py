"""The examples of the page on extending are real code: installed as an outside package, they are found and train."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
MODULES = {re.match(r'"""(\w+)\.py: ', block)[1]: block for block in BLOCKS}  # type: ignore[index]
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "outside"
version = "1.0"
[tool.setuptools]
py-modules = {modules}
{entries}
"""


@pytest.fixture(scope="module")
def found(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process finds that has the page's modules and entry points installed by pip."""
    source, site, runs = (tmp_path_factory.mktemp(name) for name in ("source", "site", "runs"))
    for name, block in MODULES.items():
        (source / f"{name}.py").write_text(block, "utf-8")
    (entries,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    project = PROJECT.format(modules=[*MODULES], entries=entries.replace("my_package.", ""))
    (source / "pyproject.toml").write_text(project, "utf-8")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*install, str(site), str(source)], check=True)
    names = ["method", "objective", "dialect", "family", "measure", "hook"]
    out = subprocess.run(
        [sys.executable, Path(__file__).with_name("installed.py"), runs, pictures, *names],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    result: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return result


def test_every_plugin_has_its_example() -> None:
    assert set(MODULES) == {"rows", "close", "plain", "dots", "brightness", "norms"}
    assert len(MODULES["rows"].splitlines()) < 70


@pytest.mark.parametrize("by", ["outputs", "inputs"])
def test_method_trains_and_merges(found: dict[str, Any], by: str) -> None:
    assert found["method"][by] == {"kinds": ["rows"], "moved": True, "merged": True, "restored": True}
    assert found["method"]["stacks"]


def test_objective_is_trained_by_and_its_terms_recorded(found: dict[str, Any]) -> None:
    first, *later = found["objective"]["drift"]
    assert found["objective"]["steps"] == 3
    assert found["objective"]["sums"]
    assert first == pytest.approx(0, abs=1e-10)  # nothing is learnt yet
    assert min(later) > 0


def test_dialect_is_written_and_read_to_the_bit(found: dict[str, Any]) -> None:
    assert found["dialect"] == {"same": True, "method": "lora"}


def test_family_trains_under_its_own_prefix(found: dict[str, Any]) -> None:
    of = found["family"]
    assert of["prefixes"] == ["transformer"]
    assert of["family"] == "dots"
    assert of["modules"] == of["changed"] > 0
    snr, sliced = of["refused"]
    assert "undefined for flow matching" in snr
    assert "its attention has one implementation" in sliced


def test_measure_is_computed_and_shown(found: dict[str, Any]) -> None:
    of = found["measure"]
    assert of["title"] == "brightness"
    assert of["bare"] == pytest.approx(0.25)  # a lighter grey than the mean of a black and a white reference
    assert of["value"] == pytest.approx(0.5)
    assert of["gain"] == pytest.approx(0.25)
    assert of["error"] == 0


def test_hook_runs_when_it_is_due(found: dict[str, Any]) -> None:
    assert found["hook"] == {"steps": [2, 4], "positive": True}
