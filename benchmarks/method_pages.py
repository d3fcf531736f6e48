"""Tables of recipe keys and methods in `docs`: ``python -m benchmarks.method_pages`` writes them.

Keys come from the recipes, options from the methods, and figures from the pages in `benchmarks/results`. The text
between the tables is written by hand. A table is between ``<!-- options -->`` (or ``measured``,
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
_SOURCES = (
    ("learning.md", "python -m benchmarks.learning --photos PHOTOS", "the embedded base, the alien", "## alien"),
    ("scale.md", "python -m benchmarks.scale", "SD 1.5 at rank 4, text encoder included", "| base | method"),
    ("step-time.md", "python -m benchmarks.step_time", "a training step of SD 1.5's UNet", "## 32 x 32"),
)
"""File, command and contents of each page of measurements, and the beginning of the line before its table"""


def page(name: str, text: str) -> str:
    """Return the page of the method called `name`, with the tables in its `text` written anew."""
    tables = {"options": _options, "measured": _measured, "formats": _formats}
    return _BLOCK.sub(lambda match: f"{match[1]}{tables[match[2]](name)}{match[3]}", text)


def keys_page(text: str) -> str:
    """Return the page of recipe keys, with the tables in its `text` written anew."""
    return re.sub(
        r"(<!-- keys (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{_keys(match[2])}{match[3]}",
        text,
        flags=re.S,
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
    """Return the table of the method's options, and the list of recipe keys that it refuses."""
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
    """Return the rows of the method in the tables of the pages of measurements."""
    shown = []
    for file, command, what, section in _SOURCES:
        if table := _rows(file, section, name):
            shown.append(f"[{what}](../../benchmarks/results/{file}) (`{command}`):\n\n{table}")
    return "\n".join(shown)


def _rows(file: str, section: str, name: str) -> str:
    """Return the first table after a line that begins with `section`, with the rows of one method; empty if none."""
    lines = (RESULTS / file).read_text("utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(section))
    table = list(_table(lines[start:]))
    rows = [line for line in table[2:] if _is_about(name, line)]
    return "".join(f"{line}\n" for line in (*table[:2], *rows)) if rows else ""


def _table(lines: list[str]) -> Iterator[str]:
    """Yield the lines of the first table in `lines`."""
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
    """Return the rows of the page of formats for the kinds of adapters that the method trains."""
    kinds = (name.replace("-", " "),)
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
