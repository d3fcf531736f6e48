"""What pages name is there: methods and their options, commands, files, links; and their tables are up to date."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.method_pages import KEYS, PAGES, keys_page, page
from diffgraft.adapters.registry import methods
from diffgraft.trainers.recipe.files import load_recipe

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "GLOSSARY", "CONTRIBUTING")])
DOCUMENTS += [ROOT / "recipes/README.md", ROOT / "trainers/README.md"]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
NAMES = [file.relative_to(ROOT).as_posix() for file in DOCUMENTS]
PATH = re.compile(r"[\w./-]+\.(?:py|md|yaml)|(?:adapters|trainers|diffgraft|recipes|docs|tests|benchmarks)/[\w./-]*")


def text_of(file: Path) -> str:
    return file.read_text("utf-8")


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_has_a_page_whose_tables_are_up_to_date(name: str) -> None:
    file = PAGES / f"{name}.md"
    assert file.is_file(), f"docs/methods/{name}.md is missing: copy another method's page"
    assert text_of(file) == page(name, text_of(file)), "run: python -m benchmarks.method_pages"
    assert f"(methods/{name}.md)" in text_of(ROOT / "docs/README.md")


def test_the_page_of_recipe_keys_is_up_to_date() -> None:
    assert text_of(KEYS) == keys_page(text_of(KEYS)), "run: python -m benchmarks.method_pages"


def test_every_page_is_about_a_method() -> None:
    assert {file.stem for file in PAGES.glob("*.md")} == {*methods(), "other"}
    assert text_of(PAGES / "other.md") == page("other", text_of(PAGES / "other.md"))


@pytest.mark.parametrize("file", sorted(PAGES.glob("*.md")), ids=lambda file: file.stem)
def test_options_that_a_page_names_exist(file: Path) -> None:
    own = methods().get(file.stem)
    known = (
        set(own.options.model_fields)
        if own
        else {key for one in methods().values() for key in one.options.model_fields}
    )
    assert set(re.findall(r"options\.(\w+)", text_of(file))) - known == set()


@pytest.mark.parametrize("file", sorted(PAGES.glob("*.md")), ids=lambda file: file.stem)
def test_commands_on_a_page_are_valid_recipes(file: Path) -> None:
    commands = re.findall(r"^diffgraft train (.+)$", text_of(file), re.MULTILINE)
    assert commands or file.stem == "other"
    for command in commands:
        name, *settings = shlex.split(command)
        recipe = load_recipe(name, dict(setting.split("=", 1) for setting in settings))
        assert recipe.method == file.stem


@pytest.mark.parametrize("file", DOCUMENTS, ids=NAMES)
def test_lines_are_short_and_links_lead_somewhere(file: Path) -> None:
    long = [
        line for line in text_of(file).splitlines() if len(line) > 120 and not line.lstrip().startswith(("|", "!["))
    ]
    assert long == []
    for link in re.findall(r"\]\(([^)#]+)", prose(text_of(file))):
        assert link.startswith("https://") or (file.parent / link).exists(), link


@pytest.mark.parametrize("file", DOCUMENTS, ids=NAMES)
def test_paths_that_a_page_names_exist(file: Path) -> None:
    """A path in backticks is that of a file from the root of the project, or of the page."""
    for span in re.findall(r"`([^`\n]+)`", prose(text_of(file))):
        if PATH.fullmatch(span) and span != "recipe.yaml":  # which runs leave
            assert (ROOT / span).exists() or (file.parent / span).exists(), span


def test_modules_that_continuous_integration_imports_exist() -> None:
    script = text_of(ROOT / ".ci/run")
    imported = re.findall(r"^from (diffgraft[\w.]*) import (\w+)", script, re.MULTILINE)
    assert imported
    for module, name in imported:
        assert hasattr(importlib.import_module(module), name)
