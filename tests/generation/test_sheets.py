"""Sheets over axes: every combination, with labels, and the session as it was before."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffgraft as dg
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.generation.sheets import Axis, Cell, draw_sheet, labelled
from diffgraft.trainers.run.folder import Run

START = Cell("a dog in the snow", 3, DrawSettings(steps=2))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("sampler=Euler, DPM++ 2M", ("Euler", "DPM++ 2M")),
        ("steps=1-4", ("1", "2", "3", "4")),
        ("steps=10-30 (+10)", ("10", "20", "30")),
        ("steps=3-1", ("3", "2", "1")),
        ("guidance=1-9 [5]", ("1", "3", "5", "7", "9")),
        ("guidance=-1-1 [3], 7.5", ("-1", "0", "1", "7.5")),
        ('prompt=dog,"cat, small"', ("dog", "cat, small")),
        ("size=64x48,48x64", ("64x48", "48x64")),
    ],
)
def test_axes_are_read_as_in_webui(text: str, values: tuple[str, ...]) -> None:
    assert Axis.read(text).values == values


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("steps", "write name=value,value"),
        ("=3", "write name=value,value"),
        ("steps=", "write name=value,value"),
        ("steps=1-100000", "must have 1 to 1000 values"),
        ("steps=1-3 (+0)", "must have 1 to 1000 values"),
        ("adapter=none/*.safetensors", "There is no file none"),
    ],
)
def test_axes_that_cannot_be_read(text: str, answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        Axis.read(text)


def test_every_cell_is_the_picture_of_its_settings(base: Base, short_run: Run) -> None:
    with Session(base) as session:
        session.use(short_run.adapter_file, 2.0, "poodle")
        sheet = draw_sheet(
            session, START, [Axis.read("sampler=Euler,Heun"), Axis.read("poodle=0,9"), Axis.read("seed=3,4")]
        )
        assert session.adapters["poodle"].strength == 2.0
        cells = []
        for seed in (3, 4):
            for strength in (0.0, 9.0):
                session.use(short_run.adapter_file, strength, "poodle")
                for sampler in ("euler", "heun"):
                    cells += session.draw(START.prompt, [seed], DrawSettings(steps=2, sampler=sampler))
    found = np.asarray(sheet)
    for number, cell in enumerate(cells):
        wanted = np.asarray(cell.resize((128, 128), Image.Resampling.NEAREST))
        half, place = divmod(number, 4)
        row, column = divmod(place, 2)
        top = half * sheet.height // 2 + 46 + row * 134
        left = sheet.width - (2 - column) * 134
        assert np.array_equal(found[top : top + 128, left : left + 128], wanted), number


def test_axes_change_what_they_say(base: Base, short_run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(short_run.adapter_file.read_bytes())
    with Session(base) as session:
        session.use(short_run.adapter_file, 9.0, "poodle")
        plain = draw_sheet(session, START, [Axis("seed", ("3",))])
        for text in (
            "prompt=snow,jungle",
            "guidance=3,7",
            "steps=2,3",
            "clip_skip=1,2",
            "hires.scale=1.5",
            "noise=cpu,gpu",
            "poodle:M00=1,-3",
            f"adapter={tmp_path}/*.safetensors",
        ):
            drawn = draw_sheet(session, START, [Axis.read(text)])
            assert drawn.width > plain.width or np.abs(np.asarray(drawn, int) - np.asarray(plain, int)).max() > 0, text
        assert list(session.adapters) == ["poodle"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("smapler=Euler", "Unknown axis 'smapler': did you mean 'sampler'"),
        ("hires.x=1", "Unknown axis 'hires.x'"),
        ("sampler=Eular", "sampler='Eular': did you mean 'euler'"),
        ("steps=ten", "has the value 'ten', which is not a whole number"),
        ("prompt=cat,bird", "The prompt has no 'cat'"),
        ("adapter=ink", "no adapter 'ink'"),
        ("poodle:M01=1", "names no block"),
        ("poodle=x", "not a number"),
    ],
)
def test_axes_that_cannot_be_drawn_are_refused_first(text: str, answer: str, base: Base, short_run: Run) -> None:
    with Session(base) as session:
        session.use(short_run.adapter_file, 1.0, "poodle")
        with pytest.raises(DiffgraftError, match=answer):
            draw_sheet(session, START, [Axis.read(text)])


def test_a_sheet_in_one_call(base: Base) -> None:
    sheet = dg.sheet("a dog", ["steps=1,2", "guidance=1,3"], base=base, steps=2)
    assert sheet.width > 2 * 128
    with pytest.raises(DiffgraftError, match="one to three axes, not 4"):
        dg.sheet("a dog", ["steps=1"] * 4, base=base)


def test_long_labels_are_cut() -> None:
    pictures = [[Image.new("RGB", (130, 40))] * 2] * 2
    sheet = labelled(pictures, ["x" * 500, "y"], ["z" * 500, ""], "t" * 5000)
    assert sheet.size == (240 + 2 * 136, 46 + 2 * 46)
