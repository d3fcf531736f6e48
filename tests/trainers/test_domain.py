"""The recipe for a field of pictures: plain captions without a trigger, in the language of the base."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from diffgraft.bases import load_base
from diffgraft.generation.graft import graft
from diffgraft.trainers.planning.plan import plan_run
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.train import train

CAPTIONS = ("一只狗在雪地里", "海边的花瓶", "一只猫在海边", "雪地里的花瓶", "一只猫", "花瓶")
"""A dog in the snow, a vase by the sea, and so on"""


@pytest.fixture
def field(tmp_path: Path) -> Path:
    """Pictures that are wider than high, each with a Chinese caption."""
    folder = tmp_path / "field"
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        picture = Image.new("RGB", (120, 96), (40 * number, 90, 160))
        ImageDraw.Draw(picture).ellipse((10 * number, 20, 50 + 10 * number, 80), fill=(250, 220, 40 * number))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, "utf-8")
    return folder


def test_chinese_captions_train_a_base_that_reads_chinese(field: Path, folders: Path, tmp_path: Path) -> None:
    """Captions reach BERT as they stand, pictures are held out, and the adapter changes what the base predicts."""
    base = load_base(folders / "taiyi")
    run = train(
        "domain", base=base, images=field, output=tmp_path / "run", resolution=128, steps=4, batch=2, rank=3,
        previews=False, validation={"share": 0.2, "every": 2},
    )  # fmt: skip
    assert [entry["step"] for entry in run.metrics if "validation" in entry] == [2, 4]
    noisy, states = torch.randn(2, 4, 8, 12), base.condition(CAPTIONS[:2], (64, 96))
    with torch.no_grad():
        bare = base.denoise(noisy, torch.tensor([300, 700]), states)
        with graft(base, run.adapter):
            adapted = base.denoise(noisy, torch.tensor([300, 700]), states)
    assert not torch.equal(bare, adapted)


def test_prompts_of_a_plan_are_the_captions(field: Path, folders: Path) -> None:
    plan = plan_run("sd15-domain", {"base": str(folders / "taiyi"), "images": str(field), "resolution": 64,
                                    "precision": "float32", "optimizer": "adamw"})  # fmt: skip
    captions = dict(plan.facts)["captions"]
    assert "5 of 5 images" in captions or "6 of 6 images" in captions
    assert any(caption in captions for caption in CAPTIONS)
    assert "trigger" not in dict(plan.facts)


@pytest.mark.parametrize("name", ["domain", "sd15-domain"])
def test_a_recipe_for_a_field_adds_nothing_to_captions(name: str) -> None:
    recipe = load_recipe(name, {})
    assert recipe.fill(recipe.caption.replace("{caption}", CAPTIONS[0])) == CAPTIONS[0]  # type: ignore[attr-defined]
    assert recipe.prior_preservation is None
    assert recipe.validation.is_on
