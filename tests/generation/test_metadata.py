"""What files of pictures tell: webui's parameters, our own record, and that they are generated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffgraft.errors import DiffgraftError
from diffgraft.generation.grammar.encode import Encoding
from diffgraft.generation.metadata import (
    PARAMETERS,
    RECORD,
    AdapterRecord,
    DrawingRecord,
    InputRecord,
    parameters,
    read_parameters,
    read_record,
    save_drawing,
)
from diffgraft.generation.settings import DrawSettings, Hires

SETTINGS = DrawSettings(
    steps=20,
    guidance=6.5,
    negative="blurry, (bad:1.2)",
    sampler="dpm++ 2m sde",
    schedule="karras",
    noise="gpu",
    variation_seed=5,
    variation_strength=0.25,
    hires=Hires(1.5, 0.55, 9, "latent bicubic"),
    encoding=Encoding(emphasis="no-norm", clip_skip=2),
)
DRAWN = DrawingRecord(
    [("a cat", 6), ("a (sks dog:1.2), ☃ <lora:ink:0.5>", 7)],
    1,
    SETTINGS.changed(),
    (96, 64),
    "models/toon.safetensors",
    "0123456789abcdef",
    {"dtype": "float32"},
    [AdapterRecord("dog", "a" * 64, 0.8), AdapterRecord("ink", "b" * 64)],
    InputRecord("c" * 64, 0.4, "d" * 64),
)


def picture() -> Image.Image:
    image = Image.effect_mandelbrot((48, 32), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    image.info = {PARAMETERS: parameters(DRAWN), RECORD: DRAWN.to_json()}
    return image


def test_parameters_are_those_of_webui() -> None:
    assert parameters(DRAWN) == (
        "a (sks dog:1.2), ☃ <lora:ink:0.5> <lora:dog:0.8>\n"
        "Negative prompt: blurry, (bad:1.2)\n"
        "Steps: 20, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 6.5, Seed: 7, Size: 96x64, "
        "Model hash: 0123456789, Model: toon, Variation seed: 5, Variation seed strength: 0.25, "
        "Denoising strength: 0.4, Clip skip: 2, Hires upscale: 1.5, Hires steps: 9, "
        "Hires upscaler: Latent (bicubic), Emphasis: No norm, "
        'Lora hashes: "dog: aaaaaaaaaaaa, ink: bbbbbbbbbbbb", '
        f"Version: diffgraft {DRAWN.version}"
    )


def test_the_settings_of_webui_are_read() -> None:
    told = (
        "a dog,\nin the snow\nNegative prompt: blurry\nbad\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, "
        'Size: 512x768, Lora hashes: "a: 1, b: 2", Note: "say \\"hi\\"", Version: v1.10.1'
    )
    prompt, negative, settings = read_parameters(told)
    assert (prompt, negative) == ("a dog,\nin the snow", "blurry\nbad")
    assert settings == {
        **{"Steps": "20", "Sampler": "Euler a", "CFG scale": "7", "Seed": "1", "Size": "512x768"},
        **{"Lora hashes": "a: 1, b: 2", "Note": 'say "hi"', "Version": "v1.10.1"},
    }
    assert read_parameters("a dog: 3, cats") == ("a dog: 3, cats", "", {})
    assert read_parameters("") == ("", "", {})


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_files_tell_all_of_it(ending: str, tmp_path: Path) -> None:
    file = save_drawing(picture(), tmp_path / f"a.{ending}")
    record, told = read_record(file)
    assert record == DRAWN
    assert record is not None
    assert DrawSettings.from_changed(record.settings) == SETTINGS
    assert told == parameters(DRAWN)
    content = file.read_bytes()
    assert b"digitalsourcetype/trainedAlgorithmicMedia" in content
    with Image.open(file) as image:
        if ending == "png":
            assert image.info["parameters"] == told  # where webui and Civitai read it
            assert np.array_equal(np.asarray(image), np.asarray(picture()))
        else:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment == b"UNICODE\0" + told.encode("utf-16-be")


def test_a_picture_without_a_record_is_saved_and_read(tmp_path: Path) -> None:
    for ending in ("png", "jpg"):
        file = save_drawing(Image.new("RGB", (8, 6)), tmp_path / f"a.{ending}")
        assert read_record(file) == (None, "")
        assert b"trainedAlgorithmicMedia" in file.read_bytes()


def _changed(**more: Any) -> str:
    return json.dumps({**json.loads(DRAWN.to_json()), **more})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{" * 5000,
        "[" * 100_000,
        _changed(place=9),
        _changed(place="x"),
        _changed(batch=7),
        _changed(prompts=[]),
        _changed(batch=[[0, float("inf")]]),
        _changed(size=[float("inf"), 64]),
        _changed(loading={}),
        _changed(settings=[]),
        _changed(adapters=[{"name": 5, "hash": ""}]),
        _changed(batch=[["a"]]),
        _changed(size=[1]),
        _changed(image={"x": 1}),
        _changed(adapters=[1]),
        _changed(more=1),
    ],
)
def test_damaged_records_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(DiffgraftError, match="record cannot be read"):
        DrawingRecord.from_json(text)
    if text:
        image = picture()
        image.info = {RECORD: text}
        file = save_drawing(image, tmp_path / "a.png")
        with pytest.raises(DiffgraftError, match="record cannot be read"):
            read_record(file)


def test_files_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    for name in ("a.png", "missing.png"):
        with pytest.raises(DiffgraftError, match="cannot be read as a picture"):
            read_record(tmp_path / name)
