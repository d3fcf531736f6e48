"""Names and summaries of methods and formats, parsed from their source, as importing them loads torch and is slow."""

import ast
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from diffgraft.adapters.groups import DIALECTS, METHODS, Plugins


def method_summaries() -> dict[str, str]:
    """Name of each method → one line on what it does, sorted by name.

    Methods of outside packages are imported, if there are any.
    """
    if entry_points(group=METHODS.group):
        from diffgraft.adapters.registry import methods

        return {name: method.summary for name, method in sorted(methods().items())}
    return {name: summary for name, summary, _ in sorted(_in_source(METHODS))}


def format_summaries() -> dict[str, str]:
    """Name of each format that adapters can be saved in → one line on what it is, sorted by name.

    Formats of outside packages are imported, if there are any.
    """
    if entry_points(group=DIALECTS.group):
        from diffgraft.adapters.registry import written_dialects

        return {name: dialect.summary for name, dialect in sorted(written_dialects().items())}
    return {name: summary for name, summary, keywords in sorted(_in_source(DIALECTS)) if "write" in keywords}


def _in_source(plugins: Plugins) -> Iterator[tuple[str, str, list[str]]]:
    """Yield name, summary and keywords of each ``METHOD = Method(name="…", summary="…", …)`` in a package's modules."""
    assignment = f"\n{plugins.attribute} = "
    for file in (Path(__file__).parent / plugins.package.rpartition(".")[2]).glob("*.py"):
        _, is_assigned, rest = file.read_text("utf-8").partition(assignment)
        if not is_assigned:
            continue
        match ast.parse(f"{assignment}{rest}").body[0]:
            case ast.Assign(value=ast.Call(keywords=keywords)):
                values = {word.arg: word.value.value for word in keywords if isinstance(word.value, ast.Constant)}
                yield str(values["name"]), str(values["summary"]), [str(word.arg) for word in keywords]
