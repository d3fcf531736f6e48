"""An outside package adds a method, a dialect and an objective by entry points, and all matrices find them."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from diffgraft.adapters import listing, registry
from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.ops.convert import convert
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.objectives.registry import check_objective, objectives
from diffgraft.trainers.recipe.files import described_keys, load_recipe
from tests.adapters.outside import DIALECT, ENTRY_POINTS, METHOD, OBJECTIVE
from tests.adapters.toys import Net, attach, shake
from tests.recipes import SUBJECT

ROOT = Path(__file__).parents[2]
_CACHED = (registry.methods, registry.kinds, registry.network_kinds, registry.dialects, objectives)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The outside package, as if it were installed."""

    def entry_points(group: str) -> list[EntryPoint]:
        if group not in ENTRY_POINTS:
            return []
        name, attribute = ENTRY_POINTS[group]
        return [EntryPoint(name, f"tests.adapters.outside:{attribute}", group)]

    monkeypatch.setattr("diffgraft.plugins.entry_points", entry_points)
    monkeypatch.setattr(listing, "entry_points", entry_points)
    for cached in _CACHED:
        cached.cache_clear()
    yield
    for cached in _CACHED:
        cached.cache_clear()


def trained() -> Adapter:
    net = Net()
    live = attach(net, "rows", {})
    shake(live)
    return live.adapter({"method": "rows"})


@pytest.mark.usefixtures("installed")
def test_they_are_in_the_registries_and_in_the_lists_of_the_command_line() -> None:
    assert registry.methods()["rows"] is METHOD
    assert registry.dialects()["piped"] is DIALECT
    assert [*registry.dialects()][-1] == "piped"  # asked last, so that it takes no file from the others
    assert objectives()["doubled"] is OBJECTIVE
    assert listing.method_summaries()["rows"] == METHOD.summary
    assert listing.format_summaries()["piped"] == DIALECT.summary
    check_objective("doubled")


@pytest.mark.usefixtures("installed")
def test_the_method_goes_through_the_dialect_and_is_converted_to_the_bit(tmp_path: Path) -> None:
    adapter = trained()
    file = adapter.save(tmp_path / "a.safetensors", "piped")
    again = load_adapter(file)
    assert again.method == "rows"
    for path, (delta,) in adapter.deltas.items():
        assert torch.equal(delta.leaves["rows"], again.deltas[path][0].leaves["rows"])
    done = convert(file, tmp_path / "b.safetensors", "diffgraft")
    assert done.comparison.same
    assert set(load_adapter(done.path).deltas) == set(adapter.deltas)
    with pytest.raises(DiffgraftError, match="cannot be written in the format 'kohya'"):
        adapter.save(tmp_path / "c.safetensors", "kohya")


@pytest.mark.usefixtures("installed")
def test_a_recipe_may_name_the_dialect_and_help_lists_it() -> None:
    settings = {"subject": "dog", "method": "rows", "format": "piped"}
    assert load_recipe(SUBJECT, settings).format == "piped"
    (meaning,) = (meaning for key, _, meaning in described_keys("subject") if key == "format")
    assert "piped" in meaning
    with pytest.raises(DiffgraftError, match=r"Invalid value format='pip': must be one of auto, .*, piped"):
        load_recipe(SUBJECT, {**settings, "format": "pip"})


def test_without_the_package_they_are_unknown() -> None:
    with pytest.raises(DiffgraftError, match="no method 'rows'"):
        registry.get_method("rows")
    with pytest.raises(DiffgraftError, match="no adapter format 'piped'"):
        registry.get_written_dialect("piped")


def test_the_matrices_of_tests_find_them(tmp_path: Path) -> None:
    """In a Python where the package is installed, the tests of methods run with it, unchanged, and pass."""
    info = tmp_path / "outside-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1\n", "utf-8")
    lines = [f"[{group}]\n{n} = tests.adapters.outside:{attribute}\n" for group, (n, attribute) in ENTRY_POINTS.items()]
    (info / "entry_points.txt").write_text("\n".join(lines), "utf-8")
    tests = ["test_methods.py", "test_load.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "rows or piped"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        done = subprocess.run(
            [*command, *(f"tests/adapters/{name}" for name in tests)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.rsplit(" passed", 1)[0].split()[-1]) >= 15
