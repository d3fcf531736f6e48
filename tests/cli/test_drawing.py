"""The commands that draw: regions, sheets, prompts from a file, random seeds, and pictures drawn again."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffgraft.generation.metadata import read_record
from diffgraft.trainers.run.folder import Run
from tests.cli.test_cli import call


def test_pictures_of_the_command_line_are_drawn_again(
    short_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "poodle.safetensors").write_bytes(short_run.adapter_file.read_bytes())
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 20))
    mask.save(tmp_path / "mask.png")
    words = ["generate", "a dog", "-a", f"{short_run.adapter_file}:0.5", "--library", tmp_path / "lib", "--steps", 2]
    words += ["--region", "0,0,0.5,1: a sks dog <lora:poodle:3>", "--region", f"{tmp_path}/mask.png:a (bird:1.2)"]
    words += ["-n", 2, "--sampler", "Euler a", "--variation-seed", 3, "--variation-strength", 0.2, "-o", tmp_path]
    assert call(monkeypatch, *words) == 0
    capsys.readouterr()
    again = ["regenerate", tmp_path / "a-dog-short-0.5-1.png", "--library", tmp_path / "lib", "-o", tmp_path / "again"]
    assert call(monkeypatch, *again) == 0
    assert "Its pixels are the same." in capsys.readouterr().out
    with (
        Image.open(tmp_path / "a-dog-short-0.5-1.png") as one,
        Image.open(tmp_path / "again" / "a-dog-short-0.5-1-again.png") as other,
    ):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_prompts_of_a_file_and_a_random_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa dog\n\n  a cat at night \n", "utf-8")
    words = ["generate", "--prompts", tmp_path / "prompts.txt", "--steps", 1, "--seed", -1, "--format", "jpg"]
    assert call(monkeypatch, *words, "-o", tmp_path / "drawn") == 0
    first, second, sheet = sorted((tmp_path / "drawn").iterdir())
    record, _ = read_record(second)
    assert record is not None
    assert first.name == f"a-cat-at-night-{record.seed}.jpg"
    assert second.name == f"a-dog-{record.seed}.jpg"
    assert sheet.name == "a-dog-grid.jpg"
    assert record.seed > 0
    assert record.prompt == "a dog"


def test_a_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "a dog", "--steps", 1, "--x", "guidance=1,3", "--y", "prompt=dog,cat", "-o", tmp_path]
    assert call(monkeypatch, *words) == 0
    (file,) = tmp_path.iterdir()
    assert file.name == "a-dog-0-sheet.png"
    with Image.open(file) as sheet:
        assert sheet.width > 2 * 128
        assert sheet.height > 2 * 128


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["generate"], "The prompt is missing"),
        (["generate", "--prompts", "none.txt"], "The prompts in none.txt cannot be read"),
        (["generate", "x", "--format", "gif"], "Invalid value format='gif'"),
        (["generate", "x", "--y", "steps=1"], "Axes are given in order"),
        (["generate", "x", "--x", "stps=1"], "Unknown axis 'stps': did you mean 'steps'"),
        (["generate", "x", "--region", "0,0,1:a dog"], "The region '0,0,1:a dog' cannot be read"),
        (["generate", "x", "--region", "0,0,2,1:a dog"], "shares from 0 to 1"),
        (["generate", "x", "--hires-steps", "3"], "hires is missing: give its scale"),
        (["regenerate", "none.png"], "none.png cannot be read as a picture"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(
    words: list[str], answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *words) == 1
    assert answer in capsys.readouterr().err
