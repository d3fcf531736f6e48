"""The pictures that ship are what the code draws, and the subjects and the style are none the base knows."""

from pathlib import Path

import numpy as np
import pytest

from diffgraft.bases.tiny.world import THINGS
from diffgraft.data.image_folder import read_folder
from diffgraft.data.pictures import upright_rgb
from diffgraft.demo import style, subject


@pytest.mark.parametrize("made_up", [subject.POODLE, subject.ALIEN], ids=lambda made_up: made_up.name)
def test_a_subject_is_drawn_again_the_same(made_up: subject.Subject, tmp_path: Path) -> None:
    subject.write_pictures(made_up, tmp_path)
    names = same(tmp_path, made_up.folder)
    assert len(names) == 5 + 8 + 8
    assert made_up.noun in THINGS


def test_the_style_is_drawn_again_the_same(tmp_path: Path) -> None:
    made_up = style.SCREEN_PRINT
    style.write_pictures(made_up, tmp_path)
    assert len(same(tmp_path, made_up.folder, apart=0.01)) == 2 * (12 + 8)  # inks are chosen at a threshold
    assert not set(made_up.learn) & set(made_up.held_out)
    captions = [picture.caption for picture in read_folder(made_up.folder / "learn")]
    assert captions[0] == "a dog on the grass"
    colours = {tuple(colour) for colour in np.asarray(style.screen_print(read_folder(tmp_path / "learn")[0].image))[0]}
    assert colours <= {*style.INKS}


def same(made: Path, shipped: Path, apart: float = 0.0) -> list[Path]:
    """Names of all files in both folders, whose content is compared; of pictures a share of pixels may differ.

    Processors round differently, which at a threshold is seen in a few pixels.
    """
    names = sorted(path.relative_to(made) for path in made.rglob("*.*"))
    assert names == sorted(path.relative_to(shipped) for path in shipped.rglob("*.*"))
    for name in names:
        if name.suffix == ".png":
            one, two = (np.asarray(upright_rgb(folder / name)) for folder in (made, shipped))
            assert (one != two).any(-1).mean() <= apart, name
        else:
            assert (made / name).read_bytes() == (shipped / name).read_bytes()
    return names
