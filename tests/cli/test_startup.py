"""What the program loads before it answers, and how it leaves."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffgraft.adapters.listing import format_summaries, method_summaries
from diffgraft.adapters.registry import methods, written_dialects


def said(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout


@pytest.mark.parametrize("command", ["methods", "recipes", "--help", "--version"])
def test_lists_are_answered_without_torch(command: str) -> None:
    code = f"import sys; sys.argv = ['diffgraft', {command!r}]\nimport diffgraft.cli.main as m\n"
    code += "try: m.main()\nexcept SystemExit: pass\nprint('torch' in sys.modules, 'numpy' in sys.modules)"
    assert said(code).splitlines()[-1] == "False False"


def test_names_are_completed_without_torch() -> None:
    code = "import sys\nfrom diffgraft.cli.completion import method_words, recipe_words\n"
    code += "print(method_words('lo'), recipe_words('sd15-s'), 'torch' in sys.modules)"
    assert said(code).strip() == "['locon', 'loha', 'lokr', 'lora'] ['sd15-style', 'sd15-subject'] False"


def test_the_list_of_methods_is_that_of_the_methods() -> None:
    assert method_summaries() == {name: method.summary for name, method in sorted(methods().items())}


def test_the_list_of_formats_is_that_of_the_dialects_that_are_written() -> None:
    assert format_summaries() == {name: dialect.summary for name, dialect in sorted(written_dialects().items())}


def test_the_readme_names_every_method_and_every_format() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    assert [name for name in (*method_summaries(), *format_summaries()) if f"`{name}`" not in readme] == []


def test_bitsandbytes_is_loaded_where_it_is_asked_for_alone() -> None:
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\nfrom diffusers import StableDiffusionPipeline\nimport peft\n"
    )
    code += "print(sys.modules['bitsandbytes'])\nfrom diffgraft.third_party import import_bitsandbytes\n"
    code += "print(import_bitsandbytes().optim.AdamW8bit.__name__)"
    assert said(code).split()[-2:] == ["None", "AdamW8bit"]


@pytest.mark.parametrize(("words", "status"), [(["methods"], 0), (["methods", "nope"], 1), (["nope"], 2)])
def test_the_program_leaves_with_its_status_and_all_that_it_said(words: list[str], status: int, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run([sys.executable, "-m", "diffgraft", *words], stdout=out, stderr=out, check=False)
    assert done.returncode == status
    assert ("textual-inversion" if status < 2 else "nope") in (tmp_path / "out").read_text("utf-8")
