"""Things that a person notices at once: help, stopping, sizes, an answer without a connection."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.run.train import train
from tests.cli.test_cli import call
from tests.conftest import SHORT
from tests.recipes import SUBJECT


@pytest.mark.parametrize("words", [["-h"], ["train", "-h"], ["generate", "-h"], ["plan", "-h"]])
def test_help_answers_to_its_short_name(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *words) == 0
    assert "Usage" in capsys.readouterr().out


def test_resize_says_both_sizes_and_warns_where_nothing_gets_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = low_rank(torch.randn(4, 30), torch.randn(20, 4), 1.0)
    file = Adapter({"unet.mid_block.attentions.0.proj_in": (lora,)}).save(tmp_path / "a.safetensors")
    assert call(monkeypatch, "resize", file, "-o", tmp_path / "b.safetensors", "--rank", 2) == 0
    told = capsys.readouterr()
    before, after = (path.stat().st_size / 1000 for path in (file, tmp_path / "b.safetensors"))
    assert f"size: {before:,.1f} kB before, {after:,.1f} kB now" in told.out
    assert "makes nothing smaller" not in told.err
    assert call(monkeypatch, "resize", file, "-o", tmp_path / "c.safetensors", "--rank", 8) == 0
    assert "has more than rank 4, so --rank 8 makes nothing smaller" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("train sd15-s", ["sd15-style", "sd15-subject"]),
        ("plan conc", ["concept"]),
        ("recipes st", ["student", "style"]),
        ("methods lo", ["locon", "loha", "lokr", "lora"]),
    ],
)
def test_a_shell_completes_names_of_recipes_and_methods(typed: str, names: list[str]) -> None:
    words = {
        **os.environ,
        "_DIFFGRAFT_COMPLETE": "complete_bash",
        "COMP_WORDS": f"diffgraft {typed}",
        "COMP_CWORD": "2",
    }
    script = "from diffgraft.cli.main import app; app(prog_name='diffgraft')"
    done = subprocess.run([sys.executable, "-c", script], env=words, capture_output=True, text=True, check=False)
    assert sorted(done.stdout.split()) == names


def test_the_walk_in_the_readme_works_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[2]
    walk = (root / "README.md").read_text("utf-8").split("The same by hand")[1].split("```")[1].strip().splitlines()
    assert [line.split()[1] for line in walk] == ["plan", "train", "generate", "inspect", "convert"]
    (tmp_path / "diffgraft").symlink_to(root / "diffgraft")
    monkeypatch.chdir(tmp_path)
    fewer = {
        "train": ["steps=2", "prior.images=2", "sample_every=0"],
        "generate": ["--steps", "2", "-n", "1", "-o", "pictures"],
    }
    for line in walk:
        program, *words = shlex.split(line)
        assert program == "diffgraft"
        assert call(monkeypatch, *words, *fewer.get(words[0], [])) == 0, capsys.readouterr().err


def test_resize_lists_modules_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = low_rank(torch.randn(4, 30), torch.randn(20, 4), 1.0)
    file = Adapter({"unet.mid_block.attentions.0.proj_in": (lora,)}).save(tmp_path / "a.safetensors")
    assert call(monkeypatch, "resize", file, "-o", tmp_path / "b.safetensors", "--rank", 2) == 0
    assert "rank    2" not in capsys.readouterr().out
    assert call(monkeypatch, "resize", file, "-o", tmp_path / "c.safetensors", "--rank", 2, "--verbose") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("rank    2  relative error") for line in lines] == [False, False, False, True]


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "none.safetensors", "NEW"],
        ["combine", "none.safetensors", "-o", "NEW"],
        ["extract", "none", "neither", "-o", "NEW", "--rank", "4"],
        ["resize", "none.safetensors", "-o", "NEW", "--rank", "4"],
        ["merge", "none.safetensors", "-o", "NEW"],
        ["grid", "none.png", "-o", "NEW"],
    ],
)
def test_a_name_that_is_taken_is_refused_before_anything_is_read(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"mine")
    assert call(monkeypatch, *(str(taken) if word == "NEW" else word for word in words)) == 1
    assert f"{taken} already exists" in capsys.readouterr().err
    assert taken.read_bytes() == b"mine"


def test_grid_lays_pictures_of_any_size_out_in_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for number, size in enumerate([(128, 96), (128, 96), (400, 100)]):
        Image.new("RGB", size, (200, 40 * number, 0)).save(tmp_path / f"{number}.png")
        files.append(tmp_path / f"{number}.png")
    assert call(monkeypatch, "grid", *files, "-o", tmp_path / "row.png") == 0
    assert call(monkeypatch, "grid", *files, "-o", tmp_path / "rows.png", "--columns", 2) == 0
    assert str(tmp_path / "rows.png") in capsys.readouterr().out
    with Image.open(tmp_path / "row.png") as row, Image.open(tmp_path / "rows.png") as rows:
        assert row.size == (3 * (128 + 6) + 6, 96 + 26)
        assert rows.size == (2 * (128 + 6) + 6, 2 * (96 + 26))
        assert row.getpixel((6 + 2 * 134 + 64, 20 + 48)) == (200, 80, 0)
        assert row.getpixel((6 + 2 * 134 + 64, 20 + 4)) == (255, 255, 255)  # the wide one keeps its shape
    assert call(monkeypatch, "grid", *files, "-o", tmp_path / "row.txt") == 1
    assert "must end in .png" in capsys.readouterr().err


def test_a_model_that_cannot_be_reached_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, constants
    from transformers import AutoModel

    from diffgraft.data.hf_models import load_hf_model

    def model_info(_self: HfApi, _name: str, *, timeout: float) -> None:
        assert timeout <= 5
        raise TimeoutError

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    with pytest.raises(DiffgraftError, match=r"The model 'some/model' was not found as a folder, .*--model FOLDER"):
        load_hf_model([AutoModel], "some/model", "look")
    assert time.monotonic() - started < 10
    assert not constants.HF_HUB_OFFLINE


def test_pictures_that_were_learnt_stand_above_before_and_after(base: Base, pictures: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "steps": 1, "sample_prompts": "a dog", "prior": {"weight": 0}, "previews": True}
    run = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    with Image.open(run.before_after) as sheet:
        assert sheet.height == 2 * (128 + 20 + 6)


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGTERM to be caught there")
def test_a_request_to_end_saves_as_ctrl_c_does(pictures: Path, tmp_path: Path) -> None:
    words = ["train", SUBJECT, f"images={pictures}", "subject=dog", "prior.weight=0", f"output={tmp_path / 'run'}"]
    words += ["steps=5000", "sample_every=0", "checkpoint_every=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffgraft", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.is_file() and metrics.read_text("utf-8").count("\n") > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"Continue with: diffgraft train --resume {tmp_path / 'run'}" in told
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["plan", SUBJECT, "images=a", "subject=dog", "images=b"], "images is given twice, as images=a and images=b"),
        (["plan", SUBJECT, "images=", "my_dog/"], "After images= there is a blank: write images=my_dog/ without it"),
        (["plan", "images=a", "subject=dog"], "The recipe comes first: diffgraft plan subject images=a subject=dog"),
        (["train", "images=a", "style"], "The recipe comes first: diffgraft train style images=a"),
        (["train", "--images", "d"], "Settings have no dashes: write images=d in the place of --images"),
        (["plan", "--network_dim=4"], "Settings have no dashes: write rank=4 in the place of --network_dim=4"),
        (["train", SUBJECT, "--resume", "runs/x"], "--resume takes no recipe, as the run in runs/x has one"),
        (["train", "--resume", "runs/x"], "There is no run to resume in runs/x"),
    ],
)
def test_words_in_another_order_than_they_are_read_are_told(
    words: list[str], answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *words) == 1
    assert answer in capsys.readouterr().err


def test_a_run_that_has_not_finished_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("task: subject\n", "utf-8")
    with pytest.raises(DiffgraftError, match=r"has not finished; continue it with `diffgraft train --resume"):
        load_adapter(tmp_path / "run")
