"""Pictures drawn again: the same pixels in every mode, and a sentence for what differs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffgraft as dg
from diffgraft.bases import Base, load_base
from diffgraft.data.image_folder import read_folder
from diffgraft.demo.subject import POODLE
from diffgraft.errors import DiffgraftError
from diffgraft.generation.attention_control import Edit, edit
from diffgraft.generation.graft import graft
from diffgraft.generation.grammar.encode import Encoding
from diffgraft.generation.image_input import ImageInput
from diffgraft.generation.inversion import invert, redraw
from diffgraft.generation.metadata import PARAMETERS, RECORD, save_drawing
from diffgraft.generation.regenerate import Sources, regenerate
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings, Hires
from diffgraft.trainers.run.folder import Run

STEPS = DrawSettings(steps=4)


@pytest.fixture
def library(short_run: Run, tmp_path: Path) -> Path:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "poodle.safetensors").write_bytes(short_run.adapter_file.read_bytes())
    return tmp_path / "library"


def photo() -> Image.Image:
    return read_folder(POODLE.folder / "learn")[0].image


def masked() -> Image.Image:
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 20:60] = 255
    return Image.fromarray(mask)


@pytest.mark.parametrize(
    ("prompt", "settings", "image"),
    [
        ("a dog", STEPS, None),
        ("a {dog|cat|bird} \\{a|b\\} <lora:poodle:0:4:end=3>", STEPS, None),
        ("a (dog:1.2) [in the snow:at night:0.5] AND a cat :0.4 BREAK in the snow", STEPS, None),
        ("a dog", replace(STEPS, sampler="dpm++ 2s a", schedule="exponential", noise="gpu", size=(96, 48)), None),
        ("a dog", replace(STEPS, variation_seed=4, variation_strength=0.4, guidance=5.0, rescale=0.5), None),
        (
            "a (dog:0.7)",
            replace(STEPS, mimic=2.0, percentile=0.95, negative="a cat", encoding=Encoding("comfyui")),
            None,
        ),
        ("a dog", replace(STEPS, hires=Hires(1.5, 0.6, 3, "lanczos")), None),
        ("a [dog:cat:1.5]", replace(STEPS, hires=Hires(1.5)), None),
        ("a dog", STEPS, ImageInput(photo(), 0.6)),
        ("a dog", STEPS, ImageInput(photo(), 0.9, masked())),
    ],
)
def test_every_mode_gives_the_same_pixels_again(
    prompt: str, settings: DrawSettings, image: ImageInput | None, base: Base, library: Path, tmp_path: Path
) -> None:
    with Session(base, library) as session:
        session.use("poodle", 2.0)
        drawn = session.draw(prompt, [3, 4, 5], settings, image)
    file = save_drawing(drawn[1], tmp_path / "drawn.png")
    given = (None, None) if image is None else (image.image, image.mask)
    again = regenerate(file, Sources(None, (), library, *given))
    assert again.differences == []
    assert again.has_same_pixels is True
    assert again.image.tobytes() == drawn[1].tobytes() != drawn[0].tobytes()


def test_edited_pictures_are_drawn_again(base: Base, library: Path, tmp_path: Path) -> None:
    change = Edit(cross=0.6, self=0.3, weights={"snow": 2.0})
    with Session(base, library) as session:
        session.use("poodle", 2.0)
        pair = edit(session, "a dog at night", "a dog in the snow", 5, change, STEPS)
        inversion = invert(session, photo(), "a dog at night", STEPS, inner=2)
        inverted = (*redraw(session, inversion, "a dog in the snow", change), *redraw(session, inversion))
    for number, picture in enumerate((*pair, *inverted)):
        file = save_drawing(picture, tmp_path / f"{number}.png")
        again = regenerate(file, Sources(None, (), library, photo()))
        assert again.differences == []
        assert again.has_same_pixels is True
    assert "Edit: \"source 'a dog at night', prompt-to-prompt with cross 0.6 and self 0.3\"" in pair[1].info[PARAMETERS]
    with pytest.raises(DiffgraftError, match="was drawn from a starting picture"):
        regenerate(tmp_path / "3.png", Sources(None, (), library))


def test_a_file_is_found_by_its_content(base: Base, library: Path, tmp_path: Path) -> None:
    with Session(base, library) as session:
        session.use("poodle", 3.0)
        (drawn,) = session.draw("a sks dog", [3], STEPS)
    file = save_drawing(drawn, tmp_path / "drawn.png")
    with pytest.raises(DiffgraftError, match=r"adapter poodle .* is not here: give its file by --adapter"):
        regenerate(file, Sources(base))
    renamed = library / "poodle.safetensors"
    renamed = renamed.rename(tmp_path / "other-name.safetensors")
    assert regenerate(file, Sources(base, [renamed])).has_same_pixels


def test_what_differs_is_told(base: Base, library: Path, tmp_path: Path, short_run: Run) -> None:
    with Session(base, library) as session:
        session.use("poodle", 3.0)
        (drawn,) = session.draw("a sks dog", [3], STEPS)
    file = save_drawing(drawn, tmp_path / "drawn.png")
    changed = short_run.adapter
    for path in changed.deltas:
        (delta,) = changed.deltas[path]
        changed = replace(
            changed,
            deltas={path: (replace(delta, leaves={name: 2 * leaf for name, leaf in delta.leaves.items()}),)},
        )
        break
    (library / "poodle.safetensors").unlink()
    changed.save(library / "poodle.safetensors")
    again = regenerate(file, Sources(base, (), library))
    assert again.has_same_pixels is False
    assert again.differences == [
        f"{library / 'poodle.safetensors'} is another file than the adapter poodle that it was drawn with."
    ]
    other = load_base("tiny", torch.bfloat16)
    with torch.no_grad():
        other.vae.decoder.conv_out.weight.mul_(1.5)
    first, second, _ = regenerate(file, Sources(other, (), library)).differences
    assert first == "It was drawn with tiny, and tiny is another base."
    assert second == "It was drawn with dtype float32, and the base has bfloat16."


def test_changes_outside_of_the_session_are_told(base: Base, short_run: Run, tmp_path: Path) -> None:
    with graft(base, {short_run.adapter: 3.0}):
        (drawn,) = Session(base).draw("a sks dog", [3], STEPS)
    again = regenerate(save_drawing(drawn, tmp_path / "a.png"), Sources(base))
    assert "changed outside of its session" in again.differences[0]


def test_sources_are_asked_for(base: Base, tmp_path: Path) -> None:
    (drawn,) = Session(base).draw("a dog", [3], STEPS, ImageInput(photo(), 0.9, masked()))
    file = save_drawing(drawn, tmp_path / "drawn.png")
    for sources, answer in (
        (Sources(base), "was drawn from a starting picture, .* by --image"),
        (Sources(base, image=photo()), "painted into a mask: give it by --mask"),
        (Sources(base, image=Image.new("RGB", (64, 64)), mask=masked()), "another picture than the one given"),
        (Sources(base, image=photo(), mask=Image.new("L", (64, 64), 255)), "another mask than the one given"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            regenerate(file, sources)


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("Steps: 4, Sampler: Euler a, Schedule type: Automatic", {"sampler": "euler a"}),
        ("Steps: 4, Sampler: DPM++ 2M Karras", {"sampler": "dpm++ 2m", "schedule": "karras"}),
        ("Steps: 4, Sampler: Euler, Clip skip: 1, RNG: CPU", {"noise": "cpu"}),
        ("Steps: 4, Sampler: Euler a, ENSD: 31337", {"sampler": "euler a", "noise_seed_delta": 31337}),
        (
            "Steps: 4, Sampler: Heun, Hires upscale: 1.5, Denoising strength: 0.5, Hires upscaler: Latent (nearest)",
            {"sampler": "heun", "hires": Hires(1.5, 0.5, 0, "latent nearest")},
        ),
    ],
)
def test_pictures_of_webui_are_drawn_as_they_say(
    line: str, settings: dict[str, Any], base: Base, tmp_path: Path
) -> None:
    (wanted,) = Session(base).draw(
        "a (dog:1.2)", [9], DrawSettings(**{"steps": 4, "guidance": 4.0, "size": (64, 48), "noise": "gpu", **settings})
    )
    image = Image.new("RGB", (64, 48))
    image.info = {
        PARAMETERS: f"a (dog:1.2)\n{line}, CFG scale: 4, Seed: 9, Size: 64x48, Model: toon, Face restoration: GFPGAN"
    }
    file = save_drawing(image, tmp_path / "a.png")
    with pytest.raises(DiffgraftError, match="drawn with the model toon: give its file by --base"):
        regenerate(file)
    again = regenerate(file, Sources(base))
    assert again.image.tobytes() == wanted.tobytes()
    assert again.differences == [
        "It was drawn by another program with the model toon.",
        "Face restoration: GFPGAN is not read.",
    ]
    assert again.has_same_pixels is False


@pytest.mark.parametrize(
    ("told", "answer"),
    [
        ("", "does not tell how it was drawn"),
        ("a dog\nSteps: 4, Sampler: Euler, CFG scale: 4", "without seed and steps"),
        ("a dog\nSteps: many, Seed: 4, CFG scale: 4", "says Steps: many, which is no number"),
        ("a dog\nSteps: 4, Seed: 4, Sampler: Best", "sampler='best'"),
    ],
)
def test_files_that_do_not_tell_enough_are_refused(told: str, answer: str, base: Base, tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 48))
    image.info = {PARAMETERS: told}
    with pytest.raises(DiffgraftError, match=answer):
        regenerate(save_drawing(image, tmp_path / "a.png"), Sources(base))


def test_a_picture_of_the_python_face_is_drawn_again(short_run: Run, tmp_path: Path) -> None:
    drawn = dg.generate("a sks dog", short_run, count=2, seed=5, steps=3)
    assert RECORD in drawn[1].info
    again = dg.regenerate(save_drawing(drawn[1], tmp_path / "a.png"), Sources(None, [short_run.adapter_file]))
    assert again.has_same_pixels
    assert again.differences == []
