"""The frame: what is packaged, what is public, and how fast the command line answers."""

import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import diffgraft as dg

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"])
    folders = {"adapters": "diffgraft.adapters", "trainers": "diffgraft.trainers", "recipes": "diffgraft.recipes"}
    found = set()
    for top in ("diffgraft", *folders):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            if parts[0] == "diffgraft" and len(parts) > 1 and parts[1] in folders:
                continue  # the link to a top-level folder, where it is followed
            found.add(".".join((folders.get(parts[0], parts[0]), *parts[1:])))
    assert found == listed


def test_public_names_are_there() -> None:
    assert {name for name in dg.__all__ if callable(getattr(dg, name))} == set(dg.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'tarin'"):
        dg.tarin  # noqa: B018


def test_help_is_quick_and_loads_no_heavy_library() -> None:
    """Measured against the help of a bare typer program, as machines differ: 0.3 s each on an idle one."""
    ours = (
        "import sys\nsys.argv = ['diffgraft', '--help']\nfrom diffgraft.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'peft', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    bare = (
        "import sys, typer\nsys.argv = ['bare', '--help']\napp = typer.Typer()\n"
        "app.command()(lambda number=1: None)\napp()"
    )
    spent: dict[str, list[float]] = {ours: [], bare: []}
    printed = {}
    for _ in range(3):
        for code, times in spent.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            printed[code] = done.stdout
    assert "train" in printed[ours]
    assert "generate" in printed[ours]
    assert min(spent[ours]) < 2.5 * min(spent[bare])


def test_imports_run_downward() -> None:
    floors = [
        "diffusion",
        "bases",
        "adapters",
        "generation",
        "data",
        "trainers",
        "evaluation",
        "predictor",
        "imports",
        "demo",
        "web",
        "cli",
    ]
    homes = {name: ROOT / name if name in ("adapters", "trainers") else ROOT / "diffgraft" / name for name in floors}
    for height, name in enumerate(floors):
        for file in homes[name].rglob("*.py"):
            for higher in floors[height + 1 :]:
                assert f"diffgraft.{higher}" not in file.read_text("utf-8"), f"{file} reaches up to {higher}"
