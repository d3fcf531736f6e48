"""The tables in `docs`, about recipe keys and methods: ``python -m benchmarks.method_pages`` writes them.

Keys are read from the recipes, options from the methods, and measured figures from the pages in `benchmarks/results`;
the text between the tables is written by hand. A table stands between ``<!-- options -->`` (or ``measured``,
``formats``, ``keys subject``) and ``<!-- end -->``.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from diffgraft.adapters.method import Method
from diffgraft.adapters.registry import methods
from diffgraft.files import write_text
from diffgraft.trainers.recipe.files import described_keys

DOCS = Path(__file__).parents[1] / "docs"
PAGES = DOCS / "methods"
KEYS = DOCS / "recipe-keys.md"
RESULTS = Path(__file__).parent / "results"
_BLOCK = re.compile(r"(<!-- (options|measured|formats) -->\n).*?(<!-- end -->)", re.DOTALL)
_READ_ONLY = ("(IA)³", "GLoRA", "OFT", "BOFT")
"""Kinds of adapters that are read and converted, and that no method trains: the page `other` has them"""
_SOURCES = (
    ("learning.md", "python -m benchmarks.learning --photos PHOTOS", "the embedded base, the poodle", "## poodle"),
    ("scale.md", "python -m benchmarks.scale", "SD 1.5 at rank 4, text encoder included", "| base | method"),
    ("step-time.md", "python -m benchmarks.step_time", "a training step of SD 1.5's UNet", "## 32 x 32"),
)
"""File, command and content of each page of measurements, and how the line begins behind which its table stands"""


def page(name: str, text: str) -> str:
    """The page of the method called `name`, with the tables in its `text` made anew."""
    tables = {"options": _options, "measured": _measured, "formats": _formats}
    return _BLOCK.sub(lambda found: f"{found[1]}{tables[found[2]](name)}{found[3]}", text)


def keys_page(text: str) -> str:
    """Return the page of recipe keys, with the tables in its `text` written anew."""
    return re.sub(
        r"(<!-- keys (\w+) -->\n).*?(<!-- end -->)", lambda at: f"{at[1]}{_keys(at[2])}{at[3]}", text, flags=re.S
    )


def _keys(task: str) -> str:
    """Return the table of the keys of the recipe `subject`, or of those that differ in another recipe."""
    rows = {key: (value, meaning) for key, value, meaning in described_keys(task)}
    if task != "subject":
        known = {key: (value, meaning) for key, value, meaning in described_keys("subject")}
        rows = {key: row for key, row in rows.items() if known.get(key) != row}
    lines = [f"| `{key}` | {_value(value)} | {_cell(meaning)} |\n" for key, (value, meaning) in rows.items()]
    return f"| key | value | meaning |\n|-|-|-|\n{''.join(lines)}"


def _options(name: str) -> str:
    """The settings that the method alone has, and keys of recipes that have no meaning for it."""
    method: Method = methods()[name]
    fields = method.options.model_fields.items()
    rows = [
        f"| `options.{key}` | {_value(field.get_default(call_default_factory=True))} | {_cell(field.description)} |\n"
        for key, field in fields
    ]
    lacking = method.unsupported_under(method.read_options({}))
    reasons = {why: [key for key, other in lacking.items() if other == why] for why in lacking.values()}
    refused = [f"- {', '.join(f'`{key}`' for key in keys)}: {why}\n" for why, keys in reasons.items()]
    shown = f"| option | default | meaning |\n|-|-|-|\n{''.join(rows)}" if rows else "It has no options of its own.\n"
    return shown + (f"\nKeys of recipes that are refused with this method:\n\n{''.join(refused)}" if refused else "")


def _value(default: object) -> str:
    shown = str(default).lower() if isinstance(default, bool) else str(default)
    return "unset" if default in (None, "", {}, []) else f"`{shown}`"


def _cell(description: str | None) -> str:
    return " ".join((description or "").split()).replace("|", "\\|")


def _measured(name: str) -> str:
    """The rows of the method on the pages of measurements."""
    shown = []
    for file, command, what, section in _SOURCES:
        if table := _rows(file, section, name):
            shown.append(f"[{what}](../../benchmarks/results/{file}) (`{command}`):\n\n{table}")
    return "\n".join(shown)


def _rows(file: str, section: str, name: str) -> str:
    """The head of the first table from a line that begins with `section` on, and its rows about the method, if any."""
    lines = (RESULTS / file).read_text("utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(section))
    table = list(_table(lines[start:]))
    rows = [line for line in table[2:] if _is_about(name, line)]
    return "".join(f"{line}\n" for line in (*table[:2], *rows)) if rows else ""


def _table(lines: list[str]) -> Iterator[str]:
    """The first table in some lines of a page."""
    started = False
    for line in lines:
        if line.startswith("|"):
            started = True
            yield line
        elif started:
            return


def _is_about(name: str, row: str) -> bool:
    first, second = (cell.strip(" `") for cell in row.strip("|").split("|")[:2])
    return name in (first, second if first == "sd1" else "")


def _formats(name: str) -> str:
    """The rows of the page of formats about the kinds of adapters that the method makes."""
    kinds = _READ_ONLY if name == "other" else (name.replace("-", " "),)
    head, line, *rows = _table((RESULTS / "formats.md").read_text("utf-8").splitlines())
    own = [row for row in rows if set(row.split("|")[1].strip().split(", ")) & set(kinds)]
    return "".join(f"{row}\n" for row in (head, line, *own))


def main() -> None:
    """Write the tables of all pages."""
    write_text(KEYS, keys_page(KEYS.read_text("utf-8")))
    for file in sorted(PAGES.glob("*.md")):
        write_text(file, page(file.stem, file.read_text("utf-8")))


if __name__ == "__main__":
    main()
