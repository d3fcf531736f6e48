"""Names and texts of foreign origin are shown, and never steer the terminal."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffgraft.cli.console import complain, say
from diffgraft.errors import DiffgraftError, one_line, printable
from diffgraft.trainers.recipe_files import load_recipe
from tests.cli.test_cli import call

EVIL = "\x1b]52;c;aGk=\x07\x9b2J\nerror: forged\r\u202eabc"


def test_what_steers_is_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("ä 猫 👩\u200d🎨\ta") == "ä 猫 👩\u200d🎨\ta"
    assert printable(EVIL) == r"\x1b]52;c;aGk=\x07\x9b2J\nerror: forged\r\u202eabc"
    say(EVIL, Path("a\x1b[2J"))
    complain(EVIL, "red")
    out, err = capsys.readouterr()
    assert out.count("\n") == 2
    assert not set("\x1b\x07\x9b\r\u202e") & set(out)
    assert "\x07" not in err
    assert "forged\n" not in err


def test_headers_and_names_in_what_inspect_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 3), f"{module}.lora_B.weight": torch.ones(5, 2)}
    save_file(tensors, tmp_path / "x.safetensors", {"ss_output_name": EVIL, "ss_network_module": EVIL})
    save_file({EVIL: torch.ones(2, 3), "b": torch.ones(2)}, tmp_path / "y\x1b]0;t\x07.safetensors")
    assert call(monkeypatch, "inspect", tmp_path / "x.safetensors") == 0
    assert call(monkeypatch, "inspect", tmp_path / "y\x1b]0;t\x07.safetensors") == 1
    out, err = capsys.readouterr()
    assert not set("\x1b\x07\x9b\r\u202e") & set(out + err)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"task: subject\n  lr: [1, 2\nsteps: 3\n", r"not readable YAML \(line 2, column"),
        (b"task: \x00", "not readable YAML"),
        ("task: subject\nsubject: Häuschen".encode("latin-1"), r"is not UTF-8 \(line 2\)"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", r"refers to \*a \(line 2\)"),
        (b"[" * 5000, "not readable YAML"),
        (b"a: 1\n" * 300_000, "is larger than"),
        (b"- a\n- b\n", "holds no keys"),
    ],
)
def test_recipes_that_cannot_be_read(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(DiffgraftError, match=said) as caught:
        load_recipe(path, {})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_long_errors_are_cut() -> None:
    assert len(one_line("x" * 15_000)) < 410
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
