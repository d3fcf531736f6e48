"""What keeps the code readable: no import cycles, short signatures, and few functions that see a whole recipe."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffgraft.bases import Base
from diffgraft.diffusion.losses import SampleLoss
from diffgraft.trainers.run import train as training
from tests.conftest import SHORT
from tests.recipes import SUBJECT

ROOT = Path(__file__).parents[1]
HOMES = {"adapters": ROOT / "adapters", "trainers": ROOT / "trainers", "": ROOT / "diffgraft"}
MOST_PARAMETERS, MOST_WITH_RECIPE, MOST_FILES_TO_THE_LOSS = 7, 10, 6


def modules() -> dict[str, Path]:
    """Dotted name of every module → its file."""
    found = {}
    for prefix, home in HOMES.items():
        for file in home.rglob("*.py"):
            inside = file.relative_to(home)
            if prefix or inside.parts[0] not in ("adapters", "trainers"):
                parts = [part for part in (prefix, *inside.with_suffix("").parts) if part and part != "__init__"]
                found[".".join(["diffgraft", *parts])] = file
    return found


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of this project that a module imports, at its top or inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found -= {name for name in known if any(name in ast.unparse(line) for line in node.body)}
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("diffgraft"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
    return found & known.keys() - {name}


def typing_only(file: Path) -> set[str]:
    """Modules that are imported for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for line in ast.walk(node):
                if isinstance(line, ast.ImportFrom) and line.module:
                    found |= {line.module, *(f"{line.module}.{alias.name}" for alias in line.names)}
    return found


def test_there_is_no_import_cycle_not_even_a_lazy_one() -> None:
    known = modules()
    graph = {name: imports(name, file, known) - typing_only(file) for name, file in known.items()}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for other in sorted(graph[name]):
            walk(other, (*path, name))
        done.add(name)

    for name in sorted(graph):
        walk(name, ())


def functions() -> Iterator[tuple[str, list[ast.arg]]]:
    """Name and parameters of every function, but for `self` and `cls`."""
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                yield f"{name}.{node.name}", [one for one in given if one.arg not in ("self", "cls")]


def test_no_function_has_more_than_seven_parameters() -> None:
    """Commands are left out: their parameters are the options that a command line has."""
    long = [
        name for name, given in functions() if len(given) > MOST_PARAMETERS and not name.startswith("diffgraft.cli.")
    ]
    assert long == []


def test_few_functions_see_the_whole_recipe() -> None:
    def is_recipe(one: ast.arg) -> bool:
        return one.annotation is not None and ast.unparse(one.annotation) in ("Recipe", "Recipe | None")

    seeing = sorted(name for name, given in functions() if any(is_recipe(one) for one in given))
    assert len(seeing) <= MOST_WITH_RECIPE, seeing


def test_train_reaches_the_loss_through_few_files(
    base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains, own = set(), SampleLoss.__call__

    def watched(self: SampleLoss, *given: Any) -> Any:
        frame, files = sys._getframe(1), [SampleLoss.__module__]
        while frame is not None and frame.f_code is not training.train.__wrapped__.__code__:
            if (name := frame.f_globals["__name__"]).startswith("diffgraft.") and name not in files:
                files.append(name)
            frame = frame.f_back
        chains.add((training.__name__, *reversed([name for name in files if name != training.__name__])))
        return own(self, *given)

    monkeypatch.setattr(SampleLoss, "__call__", watched)
    settings = {**SHORT, "steps": 1, "images": pictures, "previews": False}
    for more in ({}, {"prior": {"by": "prediction"}}, {"prior": {"weight": 0}}):
        training.train(SUBJECT, base=base, output=tmp_path / str(len(chains)), **{**settings, **more})
    assert len(chains) >= 3
    assert max(map(len, chains)) <= MOST_FILES_TO_THE_LOSS, chains
