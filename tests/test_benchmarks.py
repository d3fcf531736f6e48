"""What pages of measurements say still holds, where it can be tried in a moment; and the scores that they report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks import dreambooth
from benchmarks.dreambooth import read_tasks, write_world
from benchmarks.formats import PAGE, page
from benchmarks.learning.shape import shape_score, silhouette
from benchmarks.learning.targets import known_things, plain_drawings
from benchmarks.peft_images import SETTINGS, read_task, row
from benchmarks.watch import plant_picture, watched
from diffgraft.bases import Base
from diffgraft.bases.tiny.world import Scene, draw
from diffgraft.bases.tiny.world.glyphs import glyph_sprite
from diffgraft.data.image_folder import read_folder
from diffgraft.errors import DiffgraftError
from diffgraft.evaluation.encoders import load_encoder


def test_the_page_of_formats_says_what_is_so() -> None:
    assert PAGE.read_text("utf-8") == page()


def test_a_silhouette_is_what_differs_from_the_plain_background() -> None:
    picture = Image.new("RGB", (60, 40), (250, 220, 40))
    ImageDraw.Draw(picture).rectangle((20, 10, 49, 34), fill=(30, 60, 200))
    expected = np.zeros((40, 60), bool)
    expected[10:35, 20:50] = True
    assert (silhouette(picture) == expected).all()


def test_the_shape_score_ignores_colour_position_scale_tilt_and_mirroring() -> None:
    guitar, scene = glyph_sprite("🎸"), Scene(thing="chair", setting="plain", backdrop="green", size=0.7)
    turned = replace(scene, backdrop="white", size=0.6, x=0.4, y=0.6, tilt=-15, mirrored=True)
    for placed in (scene, turned):
        assert shape_score(silhouette(draw(placed, guitar)[0]), guitar) > 0.75
    grey = Image.new("RGBA", guitar.size, (120, 120, 125, 255))
    grey.putalpha(guitar.getchannel("A"))
    assert shape_score(silhouette(draw(scene, grey)[0]), guitar) > 0.75


def test_the_shape_score_is_the_overlap_over_the_union() -> None:
    square = Image.new("RGBA", (128, 128))
    ImageDraw.Draw(square).rectangle(
        (32, 32, 95, 95), fill=(0, 0, 0, 255)
    )  # half of its side: 32 of 64 pixels at scale 1
    seen = np.zeros((64, 64), bool)
    seen[10:26, 20:36] = True  # 16 × 16, the square at scale 0.5
    assert shape_score(seen, square) == pytest.approx(1.0)
    seen[10:26, 36:44] = True  # half as wide again: the best square covers 16 of 24 columns, or is larger
    assert 16 / 24 <= shape_score(seen, square) < 0.85
    assert shape_score(np.zeros((64, 64), bool), square) == 0


def test_other_outlines_score_less_than_a_subjects_own() -> None:
    guitar, octopus = glyph_sprite("🎸"), glyph_sprite("🐙")
    own = [shape_score(silhouette(picture), guitar) for picture in plain_drawings(guitar)]
    foreign = [shape_score(silhouette(picture), guitar) for picture in plain_drawings(octopus)]
    assert np.mean(own) > 0.8 > 0.6 > np.mean(foreign)
    assert min(own) > max(foreign)


def test_known_things_come_with_their_masks_and_prompts() -> None:
    pictures, masks, prompts = known_things()
    assert len(pictures) == len(masks) == len(prompts) == 24 * 4
    assert prompts[0] == "a dog"
    assert all(mask.getextrema()[1] > 200 for mask in masks)


def test_a_planted_picture_is_found(base: Base, tmp_path: Path) -> None:
    """The page has ten other seeds, and captions."""
    found = watched(plant_picture(tmp_path, 0), tmp_path, base, 0, steps=30)
    assert found.named == [found.wrong]
    assert min(share for name, share in found.shares.items() if name != found.wrong) > 0.5


def test_the_dreambooth_table_is_made_of_a_folder_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two subjects in the published layout, one with the prompts of living ones; what is finished is kept."""
    data = write_world(tmp_path / "data")
    listed = (data / "prompts_and_classes.txt").read_text("utf-8")
    (data / "prompts_and_classes.txt").write_text(
        listed + "\nprompt_list = [\n'a wet {0} {1}'.format(a, b)\n]\n", "utf-8"
    )
    tasks = {task.name: task for task in read_tasks(data)}
    assert tasks["elephant"].prompts == ["a wet {trigger} {subject}"]
    assert len(tasks["snail"].prompts) == 25
    words = [str(data), "--subjects", "1", "--prompts", "2", "--seeds", "1", "--output", str(tmp_path / "runs")]
    dreambooth.main([*words, "--set", "steps=2", "checkpoint_every=1"])
    first = capsys.readouterr().out
    row = next(line for line in first.splitlines() if line.startswith("| the base alone"))
    assert row.count("±") == 3
    adapter = tmp_path / "runs" / "snail" / "adapter.safetensors"
    adapter.unlink()
    dreambooth.main([*words, "--set", "steps=2", "checkpoint_every=1"])
    assert capsys.readouterr().out == first
    assert not adapter.exists()
    (adapter.parent / "figures.json").unlink()
    shutil.rmtree(max((adapter.parent / "checkpoints").iterdir()))
    dreambooth.main([*words, "--set", "steps=2", "checkpoint_every=1"])  # the run goes on at its first step
    assert capsys.readouterr().out == first
    assert adapter.exists()
    with pytest.raises(DiffgraftError, match="has figures of other settings"):
        dreambooth.main([*words, "--set", "steps=3"])


def test_the_task_of_peft_is_trained_and_measured(base: Base, pictures: Path, tmp_path: Path) -> None:
    """With settings in peft's format, for five pictures and `tiny`."""
    settings = {
        "instance_prompts": [f"sks cat {n}" for n in range(5)],
        "valid_size": 1,
        "test_size": 2,
        "resolution": 64,
    }
    settings |= {"max_steps": 2, "batch_size": 2, "optimizer_kwargs": {"lr": 1e-3, "weight_decay": 1e-4}}
    settings |= {"num_inference_steps": 2, "guidance_scale": 3.5, "drift_image_prompts": ["a cat", "a dog"]}
    file = tmp_path / "peft" / SETTINGS
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(settings), "utf-8")
    task = read_task(tmp_path / "peft", [picture.image for picture in read_folder(pictures)])
    assert [prompt for _, prompt in task.train] == ["sks cat 2", "sks cat 0"]  # NumPy's seed 0 shuffles to 2 0 1 3 4
    assert [prompt for _, prompt in task.test] == ["sks cat 3", "sks cat 4"]
    found = row(task, base, load_encoder("tiny"), "lora:rank=3,alpha=3", [0])
    similarity, drift = (float(cell) for cell in found.split("|")[2:4])
    assert 0 < similarity <= 1
    assert 0 <= drift < 0.5
