"""The tiny world: every scene can be drawn, drawn again the same, and told in words."""

import colorsys
import gzip
from pathlib import Path

import numpy as np
import pytest

from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.train.pictures import UNSEEN, scene_at
from diffgraft.bases.tiny.train.tokens import write_tokenizer
from diffgraft.bases.tiny.world import COLOURS, SETTINGS, STYLES, THINGS, Scene, caption, draw, random_scene
from diffgraft.bases.tiny.world.things import CELL, KEPT_BACK, recolour, sprite


def test_the_world_is_as_large_as_promised() -> None:
    assert len(THINGS) >= 24
    assert len(SETTINGS) >= 10
    assert len(STYLES) >= 4


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("style", STYLES)
def test_every_setting_in_every_style(setting: str, style: str) -> None:
    scene = Scene(thing="fox", setting=setting, style=style, seed=4)
    picture, mask = draw(scene)
    assert picture.size == mask.size == (64, 64)
    assert (picture.mode, mask.mode) == ("RGB", "L")
    again, _ = draw(scene)
    assert np.array_equal(np.asarray(picture), np.asarray(again))
    share = (np.asarray(mask) > 127).mean()
    assert 0.1 < share < 0.5


def test_settings_styles_and_things_look_different() -> None:
    def pixels(**change: object) -> np.ndarray:
        return np.asarray(draw(Scene(**{"thing": "car", "setting": "snow", "seed": 2, **change}))[0]).astype(int)  # type: ignore[arg-type]

    start = pixels()
    for change in (
        {"setting": "night"},
        {"style": "line"},
        {"thing": "cat"},
        {"colour": "green"},
        {"x": 0.3},
        {"mirrored": True},
    ):
        assert np.abs(pixels(**change) - start).mean() > 2, change


@pytest.mark.parametrize("thing", THINGS)
def test_every_thing_has_its_sprites(thing: str) -> None:
    for glyph in THINGS[thing]:
        alpha = np.asarray(sprite(glyph).getchannel("A"))
        assert alpha.shape == (CELL, CELL)
        assert 0.15 < (alpha > 127).mean() < 0.9
        assert glyph not in KEPT_BACK


@pytest.mark.parametrize("colour", COLOURS)
def test_a_painted_thing_has_that_colour(colour: str) -> None:
    for glyph in "🤖🚗🐇":
        pixels = np.asarray(sprite(glyph, colour)).astype(float)
        middle = np.median(pixels[pixels[..., 3] > 200][:, :3], axis=0) / 255
        hue, saturation, value = colorsys.rgb_to_hsv(*middle)
        if colour == "white":
            assert saturation < 0.15 < 0.7 < value
        elif colour == "black":
            assert value < 0.55
        else:
            away = abs(hue - colorsys.rgb_to_hsv(*COLOURS[colour])[0])
            assert min(away, 1 - away) < 0.05
            assert saturation > 0.2


def test_painting_keeps_shape_and_light() -> None:
    rng = np.random.default_rng(0)
    cut = rng.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    painted = recolour(cut, (0.1, 0.7, 0.6))
    assert np.array_equal(painted[..., 3], cut[..., 3])
    light = cut[..., :3] @ [0.30, 0.59, 0.11]
    order = np.argsort(light.ravel())
    new = (painted[..., :3] @ [0.30, 0.59, 0.11]).ravel()[order]
    assert np.corrcoef(new, np.sort(light.ravel()))[0, 1] > 0.9


def test_captions_say_what_is_there() -> None:
    rng = np.random.default_rng(1)
    wordings = set()
    for _ in range(300):
        scene = random_scene(rng)
        text = caption(scene, rng)
        wordings.add(text.replace(scene.thing, "THING"))
        assert scene.thing in text
        if scene.colour:
            assert f"{scene.colour} {scene.thing}" in text
        assert "  " not in text
        assert "{" not in text
    assert len(wordings) > 200
    fixed = Scene(thing="dog", setting="snow", colour="orange")
    texts = {caption(fixed, np.random.default_rng(seed)) for seed in range(60)}
    assert any(text.startswith(("in the snow, ", "on a snowy day, ")) for text in texts)
    assert any("an orange dog" in text for text in texts)
    assert "an sks" not in caption(fixed, rng, "sks")


def test_scenes_are_numbered_and_fixed() -> None:
    assert scene_at(5) == scene_at(5)
    assert scene_at(5) != scene_at(6)
    assert scene_at(UNSEEN + 1).thing in THINGS
    assert {scene_at(number).setting for number in range(300)} == set(SETTINGS)


def test_the_tokenizer_is_written_from_its_merges(tmp_path: Path) -> None:
    shipped = TINY / "tokenizer"
    merges = (shipped / "merges.txt").read_text("utf-8").split("\n", 1)[1]
    source = tmp_path / "merges.gz"
    source.write_bytes(gzip.compress(f"version\n{merges}and more\nthat are not used\n".encode()))
    write_tokenizer(source, tmp_path / "tokenizer")
    for name in ("merges.txt", "vocab.json"):
        assert (tmp_path / "tokenizer" / name).read_bytes() == (shipped / name).read_bytes()
