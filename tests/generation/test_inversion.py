"""Null-text inversion: a picture that was never drawn is drawn again, and edited."""

import numpy as np
import pytest

from diffgraft.bases import Base
from diffgraft.data.image_folder import read_folder
from diffgraft.demo.subject import POODLE
from diffgraft.errors import DiffgraftError
from diffgraft.generation.attention_control import Edit
from diffgraft.generation.inversion import invert, redraw
from diffgraft.generation.latents import decode, encode
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from tests.generation.test_session import bits, pixels, same

SETTINGS = DrawSettings(steps=8, guidance=4.0)


def test_a_picture_is_drawn_again_and_edited(base: Base) -> None:
    photo = read_folder(POODLE.folder / "learn")[0].image
    before = bits(base)
    through = pixels([decode(base, encode(base, [photo])[0])])  # what the VAE leaves of it
    with Session(base) as session:
        errors = {}
        for inner in (0, 50):
            inversion = invert(session, photo, "a dog on the grass", SETTINGS, inner)
            (drawn,) = redraw(session, inversion)
            errors[inner] = np.abs(pixels([drawn]) - through).mean()
        assert errors[50] < 12
        assert errors[50] < errors[0] / 2
        again, edited = redraw(session, inversion, "a dog in the snow", Edit(cross=0.6, self=0.4))
        assert np.abs(pixels([again]) - through).mean() < 12
        assert np.abs(pixels([edited]) - through).mean() > 16
    assert same(bits(base), before)


def test_without_guidance_the_way_back_is_nearly_the_way_there(base: Base) -> None:
    """More steps are nearer; the noise of a picture that was drawn is nearly the noise it was drawn from."""
    photo = read_folder(POODLE.folder / "learn")[0].image
    through = pixels([decode(base, encode(base, [photo])[0])])
    errors = []
    with Session(base) as session:
        for steps in (8, 40):
            plain = DrawSettings(steps=steps, guidance=1.0)
            (drawn,) = redraw(session, invert(session, photo, "a dog on the grass", plain, 0))
            errors.append(np.abs(pixels([drawn]) - through).mean())
    assert errors[1] < errors[0] / 2
    assert errors[1] < 6


def test_prompts_that_change_are_refused(base: Base) -> None:
    with pytest.raises(DiffgraftError, match="describe the picture plainly"):
        invert(Session(base), read_folder(POODLE.folder / "learn")[0].image, "a [dog:cat:0.5]", SETTINGS)
    for inner in (-1, 10**6, "many"):
        with pytest.raises(DiffgraftError, match="whole number from 0 to 1000"):
            invert(Session(base), read_folder(POODLE.folder / "learn")[0].image, "a dog", SETTINGS, inner)
