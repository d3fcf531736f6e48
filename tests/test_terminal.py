"""Text of foreign origin on a terminal: shown, and not acted upon."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import diffgraft as dg
from diffgraft.cli import console
from diffgraft.errors import DiffgraftError
from diffgraft.terminal import printable
from tests.cli.test_cli import call
from tests.recipes import SUBJECT

HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\r\nerror: forged\x9b31m\u202edne\u2066\x7f\ud800"


def test_what_a_terminal_acts_upon_is_written_out() -> None:
    shown = printable(HOSTILE)
    assert shown.isprintable()
    assert "\\x1b]0;title\\x07b" in shown
    assert "\\r\\nerror: forged\\x9b31m\\u202e" in shown
    assert shown.endswith("\\x7f\\ud800")
    for plain in ("ä dog – «naïve» 小狗 🐶 1×2", "", "tab is\\t written"):
        assert printable(plain) == plain


def test_headers_captions_names_and_settings_are_shown_as_text(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = HOSTILE[:-1]
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 6), f"{layer}.lora_up.weight": torch.ones(4, 2)}
    own = json.dumps({"method": evil, "trigger": evil, "base": {"family": "sd1", "name": evil}, "recipe": {evil: evil}})
    save_file(tensors, tmp_path / "evil.safetensors", {"diffgraft": own, "ss_output_name": evil})
    save_file({**tensors, f"{evil}.x": torch.ones(1)}, tmp_path / "key.safetensors")
    folder = tmp_path / "data"
    shutil.copytree(pictures, folder)
    first = next(iter(sorted(folder.iterdir())))
    first.rename(folder / f"a{evil.replace('/', '')}.png")
    (folder / f"a{evil.replace('/', '')}.txt").write_text(evil, "utf-8")
    for words in (
        ["inspect", tmp_path / "evil.safetensors"],
        ["inspect", tmp_path / "key.safetensors"],
        ["diff", tmp_path / "evil.safetensors", tmp_path / "evil.safetensors"],
        ["plan", SUBJECT, f"images={folder}", f"subject={evil}", f"trigger={evil}"],
        ["plan", SUBJECT, f"{evil}=3"],
        ["generate", "x", "-a", evil],
        ["recipes", evil],
        ["methods", evil],
    ):
        call(monkeypatch, *words)
        told = capsys.readouterr()
        shown = told.out + told.err
        assert shown.strip()
        lines = [line.split("\r")[-1] for line in shown.split("\n")]  # bars go back to the line's beginning
        assert all(line.isprintable() for line in lines), words
        assert not any(line.startswith("error: forged") for line in lines), words


def test_results_in_python_are_printed_as_text(pictures: Path, tmp_path: Path) -> None:
    layer, evil = "lora_unet_mid_block_attentions_0_proj_in", HOSTILE[:-1]
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 6), f"{layer}.lora_up.weight": torch.ones(4, 2)}
    own = json.dumps({"method": evil, "trigger": evil, "base": {"family": "sd1", "name": evil}})
    save_file(tensors, tmp_path / "evil.safetensors", {"diffgraft": own})
    results = (
        dg.inspect(tmp_path / "evil.safetensors"),
        dg.plan(SUBJECT, images=pictures, subject="dog", trigger=evil),
    )
    for result in results:
        lines = str(result).split("\n")
        assert all(line.isprintable() for line in lines)
        assert any("\\x1b]0;title" in line for line in lines)
        assert not any(line.startswith("error: forged") for line in lines)


def test_json_is_json_whatever_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    console.say_json({"a": [float("nan"), 1.5], "b": (float("inf"), -float("inf")), 3: {"c": HOSTILE[:-1]}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None, None], "3": {"c": HOSTILE[:-1]}}


def test_long_errors_keep_their_beginning_and_their_end() -> None:
    text = str(DiffgraftError("It begins. " + "x" * 20000 + " It ends."))
    assert text.startswith("It begins. ")
    assert text.endswith(" It ends.")
    assert len(text) < 1300
    assert str(DiffgraftError("short")) == "short"
