"""What a run would do: counted on an outline as on the base itself, with its pitfalls named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base
from diffgraft.bases.meta_base import meta_base
from diffgraft.data.near_duplicates import Fingerprint, fingerprint, near_duplicates
from diffgraft.data.pictures import Picture
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.planning import pitfalls
from diffgraft.trainers.planning.estimate import Cost, Workload, denoiser_speed, estimate_cost
from diffgraft.trainers.planning.plan import Plan, plan_run
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.attach import attach
from diffgraft.trainers.run.train import train
from tests.conftest import SHORT
from tests.recipes import SUBJECT
from tests.trainers.test_materials import folder


def cost_of(recipe: Recipe, base: Base, size: tuple[int, int], passes: int = 1) -> Cost:
    """The cost of a recipe on pictures of a size, as a plan has it."""
    work = Workload(
        *(size, ["a dog"], recipe.batch * passes, recipe.accumulate),
        *(recipe.gradient_checkpointing, recipe.block_swap),
    )
    return estimate_cost(base, lambda: attach(recipe, base), work, recipe.model, recipe.optim, whole=False)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "taiyi"])
def test_an_outline_is_the_base_without_values(family: str, folders: Path) -> None:
    held, found = load_base(folders / family, torch.bfloat16), meta_base(folders / family, torch.bfloat16)
    assert found.family.name == held.family.name == family
    for (name, part), (_, shape) in zip(held.parts(), found.parts(), strict=True):
        wanted = {key: (tuple(value.shape), value.dtype) for key, value in part.named_parameters()}
        assert {key: (tuple(value.shape), value.dtype) for key, value in shape.named_parameters()} == wanted, name
        assert all(value.is_meta for value in shape.parameters())
    assert (found.resolution, found.vae_scale_factor, found.prediction_type) == (
        held.resolution,
        held.vae_scale_factor,
        held.prediction_type,
    )
    assert found.tokenizer("a sks dog").input_ids == held.tokenizer("a sks dog").input_ids


def test_what_is_no_base_has_no_outline(tmp_path: Path) -> None:
    with pytest.raises(DiffgraftError, match=r"no model_index\.json"):
        meta_base(tmp_path)
    with pytest.raises(DiffgraftError, match="there is no such file"):
        meta_base(tmp_path / "none.safetensors")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "loha", "full", "textual-inversion", "hypernetwork"])
def test_the_cost_is_that_of_the_base_itself(method: str, checkpointing: bool) -> None:
    """Counts are the same; what PyTorch's attention keeps differs a little between devices."""
    trigger = {"trigger": "<zorp>"} if method == "textual-inversion" else {}
    settings = {"subject": "dog", "method": method, "gradient_checkpointing": checkpointing, **trigger}
    plan = load_recipe(SUBJECT, settings)
    found, wanted = (cost_of(plan, base, (64, 48), passes=2) for base in (meta_base("tiny"), load_base("tiny")))
    assert (found.trained, found.weights, found.training) == (wanted.trained, wanted.weights, wanted.training)
    assert found.activations == pytest.approx(wanted.activations, rel=0.02)
    assert found.step == pytest.approx(wanted.step, rel=0.15)
    assert found.image == pytest.approx(wanted.image, rel=0.1)


def test_a_loha_is_twice_as_large_as_its_summary_says() -> None:
    plans = {method: load_recipe(SUBJECT, {"subject": "dog", "method": method}) for method in ("locon", "loha")}
    locon, loha = (cost_of(plan, meta_base("tiny"), (64, 64)).trained for plan in plans.values())
    assert loha == 2 * locon
    assert "twice the size" in get_method("loha").summary


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("lora", {}),
        ("lora", {"rank": 1}),
        ("lora", {"options.dora": True}),
        ("lora", {"options.init": "pissa"}),
        ("glora", {}),
        ("oft", {}),
        ("lokr", {}),
        ("loha", {"rank": 2}),
        ("pivotal", {"trigger": "<zorp>"}),
        ("custom", {"trigger": "<zorp>"}),
        ("hypernetwork", {}),
    ],
)
def test_the_size_of_the_file_is_told_within_a_tenth(
    method: str, more: dict[str, Any], base: Base, pictures: Path, tmp_path: Path
) -> None:
    settings = {"subject": "dog", "method": method, **more, "steps": 1, "prior.weight": 0, "previews": False}
    told = cost_of(load_recipe(SUBJECT, settings), meta_base("tiny"), (64, 64)).file
    run = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", sample_every=0, **settings)
    assert run.adapter_file.stat().st_size == pytest.approx(told, rel=0.1)


def test_checkpointing_keeps_less_and_batches_more() -> None:
    def found(**settings: Any) -> Any:
        plan, base = load_recipe(SUBJECT, {"subject": "dog", **settings}), meta_base("tiny")
        return cost_of(plan, base, (64, 64))

    one, two, spared = found(batch=2), found(batch=4), found(batch=4, gradient_checkpointing=True)
    assert two.activations == pytest.approx(2 * one.activations, rel=0.05)
    assert two.step == pytest.approx(2 * one.step, rel=0.01)
    assert 0.1 * two.activations < spared.activations < 0.6 * two.activations
    assert spared.step > 1.2 * two.step
    assert found(batch=2, accumulate=3).step == pytest.approx(3 * one.step)
    eight = found(batch=2, optimizer="adamw8bit")
    assert (one.training, eight.training) == (16 * one.trained, 10 * one.trained)
    assert found(batch=2, ema=0.9).training == 20 * one.trained


def test_class_images_double_a_step(pictures: Path) -> None:
    with_them, without, held = (
        dict(told(SUBJECT, pictures, subject="dog", prior=prior).facts)["memory"]
        for prior in ({"weight": 1}, {"weight": 0}, {"weight": 1, "by": "prediction"})
    )
    assert with_them == held != without


def test_the_file_is_as_large_as_said(base: Base, pictures: Path, tmp_path: Path) -> None:
    plan = load_recipe(SUBJECT, {"subject": "dog", "method": "loha"})
    said = cost_of(plan, meta_base("tiny"), (64, 64)).trained * 4
    settings: dict[str, Any] = {**SHORT, "steps": 1, "prior": {"weight": 0}, "sample_prompts": "a dog"}
    run = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", method="loha", **settings)
    assert run.adapter_file.stat().st_size == pytest.approx(said, rel=0.02)


def test_speed_is_a_number_that_this_machine_can_reach() -> None:
    assert 1e8 < denoiser_speed(meta_base("tiny"), torch.device("cpu")) < 1e14


def told(recipe: str, images: Path, **settings: Any) -> Plan:
    return plan_run(recipe, {"images": images, **settings})


def test_a_plan_tells_what_there_is(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 6, (90, 60))
    folder(data, 2, (50, 100), start=6)
    (data / "00.txt").write_text("a sks dog, sitting", "utf-8")
    found = told(
        SUBJECT, data, subject="dog", buckets={"use": True}, flip=True, validation={"share": 0.25, "every": 20},
        steps=30, batch=2,
    )  # fmt: skip
    facts = dict(found.facts)
    assert facts["recipe"] == "subject by lora on tiny (sd1, 64 px)"
    assert facts["images"].startswith("6, each in 2 variants")
    assert facts["held out"] == "2, every 20 steps"
    assert sum(int(part.split(": ")[1]) for part in facts["sizes"].split(", ")) == 6
    assert facts["steps"] == "30, of 2 images each: 10 epochs of 6"
    assert facts["trained"].startswith("107,520 parameters")
    assert "64 images" in facts["class"]
    assert str(found).count("\n") == len(found.facts) + len(found.pitfalls) - 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trigger": "dog"}, "equals the class noun"),
        ({"trigger": "house"}, "'house' is a common word"),
        ({"trigger": "zwx", "class_prompt": "a zwx {subject}"}, "occurs in a class prompt"),
        ({"tags": {"shuffle": True}}, "no caption contains the separator ','"),
        ({"insert_trigger": True}, "insert_trigger=true does nothing"),
        ({"masks": {"use": True}}, "masks.use=true does nothing"),
        ({"validation": {"patience": 3}}, "patience does nothing"),
        ({"steps": 20, "warmup": 20}, "warmup=20 lasts for all"),
        ({"steps": 50, "ema": 0.999}, "ema=0.999 is too slow for 50 steps: 95%"),
        ({"crop": "random"}, "crop=random does nothing"),
        (
            {"optimizer": "prodigy"},
            "finds by lr=0.0015, so it hardly learns: set lr=1",
        ),
        ({"steps": 20, "text_encoder": True, "text_encoder_stop": 20}, "text_encoder_stop=20 is not below steps=20"),
        ({"steps": 20, "adapter_every": 21}, "no intermediate adapter is saved"),
        ({"prior": {"by": "prediction", "images": 9}}, "prior.images does nothing"),
        ({"prompt": " ", "trigger": ""}, "all prompts are empty"),
    ],
)
def test_pitfalls_are_named(pictures: Path, settings: dict[str, Any], said: str) -> None:
    clean = told(SUBJECT, pictures, subject="dog", prior={"weight": 0})
    assert clean.pitfalls == []
    found = told(SUBJECT, pictures, subject="dog", **{"prior": {"weight": 0}, **settings})
    assert any(said in one for one in found.pitfalls), found.pitfalls


def test_long_captions_shared_triggers_and_copies_are_named(tmp_path: Path) -> None:
    data, other = folder(tmp_path / "data", 3, (90, 60)), folder(tmp_path / "other", 1, (80, 80), start=7)
    (data / "00.txt").write_text("a sks " + "very " * 90 + "good dog", "utf-8")
    coarse = Image.fromarray(np.random.default_rng(9).integers(0, 255, (8, 12, 3), np.uint8))
    coarse.resize((90, 60), Image.Resampling.BICUBIC).save(data / "01.png")
    coarse.resize((180, 120), Image.Resampling.BICUBIC).save(data / "copy.jpg", quality=80)
    concepts = [{"images": str(data), "subject": "dog"}, {"images": str(other), "subject": "cat"}]
    found = "\n".join(plan_run(SUBJECT, {"concepts": concepts, "prior": {"weight": 0}}).pitfalls)
    assert "prompt of 00.png is too long" in found
    assert "is shared by several concepts: cat, dog" in found
    assert "01.png and copy.jpg are nearly the same image" in found
    assert "02.png" not in found


def test_what_cannot_be_opened_is_not_counted(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 3, (64, 64))
    Image.effect_noise((300, 200), 90).convert("RGB").save(data / "bad.jpg")
    whole = (data / "bad.jpg").read_bytes()
    (data / "bad.jpg").write_bytes(whole[: len(whole) // 2])
    found = told(SUBJECT, data, subject="dog", steps=30, batch=2, prior={"weight": 0})
    assert dict(found.facts)["steps"] == "30, of 2 images each: 20 epochs of 3"
    assert [said for said in found.pitfalls if said.startswith("bad.jpg is skipped: it cannot be read")]
    for file in data.glob("*.png"):
        file.unlink()
    with pytest.raises(DiffgraftError, match="None of the 1 images can be opened"):
        told(SUBJECT, data, subject="dog", prior={"weight": 0})


def test_of_many_pictures_only_the_first_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are in the headers; opening ten thousand pictures would take minutes."""
    data = folder(tmp_path / "data", 5, (90, 60))
    monkeypatch.setattr(pitfalls, "_MIN_COMPARED", 2)
    monkeypatch.setattr(pitfalls, "_MAX_PIXELS", 0)
    opened: list[str] = []

    def image(picture: Picture) -> Image.Image:
        opened.append(picture.name)
        return Image.new("RGB", (90, 60))

    monkeypatch.setattr(Picture, "image", property(image))
    assert dict(told(SUBJECT, data, subject="dog", prior={"weight": 0}).facts)["sizes"] == "64x64: 5"
    assert opened == ["00.png", "01.png"]


def test_squares_that_cut_much_away_are_advised_against(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 3, (96, 64))
    settings: dict[str, Any] = {"subject": "dog", "prior": {"weight": 0}}
    assert "square crops lose 33% of the images: buckets.use=true" in str(told(SUBJECT, data, **settings))
    assert "square crops" not in str(told(SUBJECT, data, **settings, buckets={"use": True}))


def test_folders_of_several_things_are_no_concepts(tmp_path: Path) -> None:
    for name in ("10_sks dog", "2_zwx cat"):
        folder(tmp_path / "data" / name, 2, (64, 64), start=len(name))
    found = told(SUBJECT, tmp_path / "data", subject="dog", prior={"weight": 0})
    assert "the images in 2_zwx cat are learned as a dog, too" in str(found)
    assert dict(found.facts)["trigger"] == "sks, zwx"
    concepts = [{"images": str(one), "subject": "dog"} for one in (tmp_path / "data").iterdir()]
    with pytest.raises(DiffgraftError, match=r"images=.* would be ignored, as each concept has images of its own"):
        told(SUBJECT, tmp_path / "data", concepts=concepts)
    own = [{**one, "trigger": word} for one, word in zip(concepts, ("zwx", "ohwx"), strict=True)]
    found = plan_run(SUBJECT, {"concepts": own, "trigger": "zorp", "prior": {"weight": 0}})
    assert "trigger=zorp is the trigger of no concept" in str(found)
    samples = load_recipe(SUBJECT, {"concepts": own}).samples()
    assert samples[:2] == ["a zwx dog", "a ohwx dog"]
    assert samples[-1] == "a dog"


def test_poses_on_white_are_not_the_same_picture() -> None:
    prints = []
    for number, (left, top) in enumerate(((60, 20), (110, 90), (20, 120))):
        image = Image.new("RGB", (256, 224), "white")
        ImageDraw.Draw(image).ellipse((left, top, left + 110, top + 90), "red")
        prints.append((str(number), fingerprint(image)))
    bits = [one.differences for _, one in prints]
    assert near_duplicates([(name, Fingerprint(bits[0], one.cells)) for name, one in prints]) == []
    assert near_duplicates([("a", prints[0][1]), ("b", prints[0][1])]) == [("a", "b")]


def test_fingerprints_are_near_for_copies_and_far_for_others() -> None:
    rng = np.random.default_rng(4)
    images = [Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize((320, 240), 2) for _ in range(12)]
    prints = [(str(number), fingerprint(image)) for number, image in enumerate(images)]
    assert near_duplicates(prints) == []
    small = fingerprint(images[5].resize((100, 75), Image.Resampling.LANCZOS))
    assert near_duplicates([*prints, ("copy", small)]) == [("5", "copy")]


def test_what_train_would_refuse_a_plan_refuses(pictures: Path) -> None:
    with pytest.raises(DiffgraftError, match="needs a multiple of 8"):
        told(SUBJECT, pictures, subject="dog", resolution=60)
    with pytest.raises(DiffgraftError, match="has no images"):
        plan_run(SUBJECT, {"subject": "dog"})
    with pytest.raises(DiffgraftError, match="Unknown tracker 'tensorbord'"):
        told(SUBJECT, pictures, subject="dog", trackers="tensorbord")
    with pytest.raises(DiffgraftError, match="attention=xformers"):
        told(SUBJECT, pictures, subject="dog", attention="xformers")
    with pytest.raises(DiffgraftError, match="cannot be combined with shard"):
        told(SUBJECT, pictures, subject="dog", shard="fsdp", compile=True)
