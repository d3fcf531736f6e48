"""Names and summaries of the methods, read from their source: importing them takes torch, and that takes seconds."""

import ast
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

GROUP = "diffgraft.methods"
"""Entry-point group in which outside packages name their methods"""
PACKAGE = "diffgraft.adapters.methods"
"""The package whose modules hold the methods"""


def summaries() -> dict[str, str]:
    """Name of each method → one line on what it does, in the order of the names.

    Methods of outside packages are imported, if there are any.
    """
    found = dict(_own())
    if entry_points(group=GROUP):
        from diffgraft.adapters.registry import methods

        found = {name: method.summary for name, method in methods().items()}
    return dict(sorted(found.items()))


def _own() -> Iterator[tuple[str, str]]:
    """Of each module in `methods/` that says ``METHOD = Method(name="…", summary="…", …)``, these two."""
    for file in Path(__file__).with_name("methods").glob("*.py"):
        for statement in ast.parse(file.read_text("utf-8")).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id="METHOD")], value=ast.Call(keywords=keywords)):
                    told = {word.arg: word.value.value for word in keywords if isinstance(word.value, ast.Constant)}
                    yield str(told["name"]), str(told["summary"])
