"""Triggers come from where the words do; prompts have them as words; what is validated with is each concept's own."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffgraft.bases import Base
from diffgraft.data.captions import PromptBuilder, caption_lines, mentions
from diffgraft.data.settings import Tags
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.planning.plan import plan_run
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.recipe.settings import Validation
from diffgraft.trainers.run.train import train
from diffgraft.trainers.training_data.build import Sample, collect_samples, split_samples
from diffgraft.trainers.training_data.concepts import read_concepts
from diffgraft.trainers.training_data.holdout import rows_held_out
from tests.conftest import SHORT
from tests.recipes import SUBJECT
from tests.trainers.test_materials import folder

PLAIN: dict[str, Any] = {"subject": "man", "prior.weight": 0}


def read(recipe: str, images: Path, **settings: Any) -> tuple[Recipe, list[tuple[str, str]]]:
    """The recipe as it comes to be, and of each concept its trigger and the prompt without a caption."""
    found, parts = read_concepts(load_recipe(recipe, {"images": str(images), **settings}))
    return found, [(part.trigger, part.prompt) for part, _ in parts]


def items_of(base: Base, recipe: str, **settings: Any) -> tuple[Recipe, list[Sample]]:
    found, parts = read_concepts(load_recipe(recipe, settings))
    return found, collect_samples(found.data, parts, base)


@pytest.mark.parametrize(
    ("name", "recipe", "subject", "trigger"),
    [
        ("10_ohwx man", "subject", "man", "ohwx"),
        ("10_a photo of ohwx man", "subject", "man", "ohwx"),
        ("10_john smith man", "subject", "man", "john smith"),
        ("10_ohwx", "subject", "man", "ohwx"),
        ("10_ohwx woman", "subject", "man", "ohwx"),
        ("10_sks man", "subject", "man", "sks"),
        ("10_man", "subject", "man", "sks"),
        ("10_inkwash style", "style", "", "inkwash"),
        ("10_{trigger} man", "subject", "man", "sks"),
        ("10_an old man who sits in the garden", "subject", "man", "sks"),
    ],
)
def test_the_trigger_is_the_word_of_the_folder(
    tmp_path: Path, name: str, recipe: str, subject: str, trigger: str
) -> None:
    folder(tmp_path / name, 1)
    given = {"subject": subject} if subject else {}
    found, parts = read(recipe, tmp_path, **given)
    assert (found.trigger, parts) == (trigger, [(trigger, name.partition("_")[2])])
    assert any(mentions(prompt, trigger) for prompt in found.samples())
    explicit, _ = read(recipe, tmp_path, **given, trigger="zwx")
    assert explicit.trigger == "zwx"


def test_captions_that_have_the_trigger_come_before_the_name_of_their_folder(tmp_path: Path) -> None:
    folder(tmp_path / "10_ohwx man", 1)
    (tmp_path / "10_ohwx man" / "00.txt").write_text("a sks man", "utf-8")
    assert read("subject", tmp_path, subject="man")[0].trigger == "sks"
    (tmp_path / "10_ohwx man" / "00.txt").write_text("ohwx man at sea", "utf-8")
    assert read("subject", tmp_path, subject="man")[0].trigger == "ohwx"
    (tmp_path / "10_ohwx man" / "00.txt").write_text("sks, an ohwx man", "utf-8")
    assert read("subject", tmp_path, subject="man")[0].trigger == "sks"
    (tmp_path / "10_ohwx man" / "00.txt").write_text("a man at sea", "utf-8")
    assert read("subject", tmp_path, subject="man")[0].trigger == "sks"
    assert read("subject", tmp_path, subject="man", insert_trigger=True)[0].trigger == "ohwx"


def test_an_empty_trigger_is_not_put_before_captions(base: Base, tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 1)
    (data / "00.txt").write_text("a dog at sea", "utf-8")
    _, (item,) = items_of(base, SUBJECT, images=str(data), subject="dog", trigger="", insert_trigger=True)
    assert item.prompt_builder.prompts() == ["a dog at sea"]


def test_a_round_has_no_more_places_than_can_be_kept(base: Base, tmp_path: Path) -> None:
    folder(tmp_path / "data" / "900_sks dog", 1)
    with pytest.raises(DiffgraftError, match=r"The repeats make an epoch of 9,000,000 images"):
        items_of(base, SUBJECT, images=str(tmp_path / "data"), subject="dog", repeats=10_000)


def test_folders_that_are_called_differently_are_concepts(tmp_path: Path) -> None:
    folder(tmp_path / "3_ohwx man", 1)
    folder(tmp_path / "2_zwx man", 1, start=4)
    found, _ = read("subject", tmp_path, subject="man", repeats=2)
    assert [(one.trigger, one.prompt, one.repeats) for one in found.concepts] == [
        ("zwx", "zwx man", 4),
        ("ohwx", "ohwx man", 6),
    ]
    assert [prompt for prompt in found.samples() if "snow" in prompt] == [
        "a zwx man in the snow",
        "a ohwx man in the snow",
    ]
    again, parts = read_concepts(found)  # as a run that goes on reads it
    assert again == found
    assert [(part.repeats, part.trigger) for part, _ in parts] == [(4, "zwx"), (6, "ohwx")]


def test_a_numbered_folder_that_is_a_link_is_read_only_where_that_is_meant(tmp_path: Path) -> None:
    folder(tmp_path / "data" / "2_ohwx man", 1)
    (tmp_path / "data" / "3_zwx man").symlink_to(folder(tmp_path / "secret", 1, start=4))
    with pytest.raises(DiffgraftError, match=r"3_zwx man is a file outside of .*secret.*outside=true"):
        read("subject", tmp_path / "data", subject="man")
    assert len(read("subject", tmp_path / "data", subject="man", outside=True)[1]) == 2


def test_a_run_is_called_as_its_folder_is(base: Base, tmp_path: Path) -> None:
    folder(tmp_path / "data" / "2_ohwx man", 2)
    settings: dict[str, Any] = {**SHORT, "subject": "man", "steps": 1, "prior": {"weight": 0}}
    run = train(SUBJECT, base=base, images=tmp_path / "data", output=tmp_path / "run", **settings)
    assert run.adapter.metadata["trigger"] == "ohwx"
    assert run.recipe.samples()[0] == "a ohwx man"
    assert "trigger: ohwx" in (tmp_path / "run" / "recipe.yaml").read_text("utf-8")


def test_words_are_found_as_words() -> None:
    assert not mentions("an elephant with tusks at its desks", "sks")
    assert mentions("Sks, sitting", "sks")
    assert mentions("a <my-dog>, sitting", "<my-dog>")
    assert mentions("一只sks狗", "sks")
    assert not mentions("a sks2 dog", "sks")
    assert mentions("a dog", "")


def test_prompts_without_the_trigger_are_told_of_and_the_advice_holds(base: Base, tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 2)
    (data / "00.txt").write_text("an elephant with white tusks", "utf-8")
    (data / "01.txt").write_text("a {trigger} {subject} by a lake", "utf-8")
    with pytest.warns(UserWarning, match=r"caption of 00\.png lacks the trigger 'sks'\. insert_trigger=true"):
        _, items = items_of(base, SUBJECT, images=str(data), **PLAIN)
    assert [one.prompt_builder.prompts() for one in items] == [
        ["an elephant with white tusks"],
        ["a sks man by a lake"],
    ]
    _, items = items_of(base, SUBJECT, images=str(data), **PLAIN, insert_trigger=True)
    assert items[0].prompt_builder.prompts() == ["sks, an elephant with white tusks"]
    folder(tmp_path / "kohya" / "3_man", 1)
    with pytest.warns(UserWarning, match="'man', lacks the trigger 'sks'. insert_trigger=true"):
        items_of(base, SUBJECT, images=str(tmp_path / "kohya"), **PLAIN)
    told = plan_run(SUBJECT, {"images": tmp_path / "kohya", **PLAIN, "insert_trigger": True})
    assert "lacks" not in str(told)
    assert "does nothing" not in str(told)
    assert "such as: sks, man" in str(told)


def test_a_class_prompt_of_a_style_has_no_filled_trigger(base: Base, tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 1)
    (data / "00.txt").write_text("a {trigger} house, Sks style", "utf-8")
    _, (item,) = items_of(base, "style", images=str(data))
    assert item.prompt_builder.prompts() == ["a sks house, Sks style"]
    assert item.class_prompt_builder.texts == ("a house",)


def test_tags_with_the_trigger_are_never_dropped() -> None:
    import numpy as np

    tags = Tags(separator=",", shuffle=True, drop=0.9)
    wording = PromptBuilder(("tree, SKS dog, tusks, lake, sky",), kept_word="sks")
    said = [wording.prompt(0, tags, 0.0, np.random.default_rng(n)) for n in range(60)]
    assert all("SKS dog" in one for one in said)
    assert sum("tusks" in one for one in said) < 20
    bare = PromptBuilder(("tree, SKS dog, tusks, lake, sky",))
    for n, one in enumerate(said):  # what else is dropped is as it was without
        others = bare.prompt(0, tags, 0.0, np.random.default_rng(n)).split(", ")
        assert [tag for tag in one.split(", ") if tag != "SKS dog"] == [
            tag for tag in others if tag not in ("SKS dog", "")
        ]


@pytest.mark.parametrize("caption", ["tree, SKS dog, lake, sky", ""])
def test_a_run_drops_tags_of_captions_and_of_the_prompt_but_never_the_trigger(
    base: Base, tmp_path: Path, caption: str
) -> None:
    import numpy as np

    data = folder(tmp_path / "data", 1)
    if caption:
        (data / "00.txt").write_text(caption, "utf-8")
    settings: dict[str, Any] = {"images": str(data), "subject": "dog", "prompt": "hill, {trigger} dog, lake, sky"}
    recipe, (item,) = items_of(base, SUBJECT, **settings, **{"tags.drop": 0.9})
    said = [item.prompt_builder.prompt(0, recipe.tags, 0.0, np.random.default_rng(n)) for n in range(40)]
    assert all(mentions(one, "sks") for one in said)
    assert sum("lake" in one for one in said) < 20


@pytest.mark.parametrize(
    ("how", "texts"),
    [
        ("first", ["a sks dog"]),
        ("random", ["a sks dog", "sks, sunny", "on grass"]),
        ("join", ["a sks dog, sks, sunny, on grass"]),
    ],
)
def test_captions_of_several_lines(base: Base, tmp_path: Path, how: str, texts: list[str]) -> None:
    data = folder(tmp_path / "data", 1)
    (data / "00.txt").write_text(
        "a sks dog\r\n\n  sks, sunny,\non grass\n".replace("sunny,", "sunny," if how == "join" else "sunny"), "utf-8"
    )
    assert caption_lines("a\n\nb", "random") == ("a", "b")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _, (item,) = items_of(base, SUBJECT, images=str(data), subject="dog", **{"captions.lines": how})
    assert any("has several lines" in str(one.message) for one in seen)
    assert list(item.prompt_builder.texts) == texts


def test_a_word_for_captions_is_written_as_it_was() -> None:
    plain, off = (load_recipe("style", {"captions": value}) for value in (True, "false"))
    assert (plain.captions.use, off.captions.use) == (True, False)
    assert (plain.model_dump()["captions"], off.header()["captions"]) == (True, False)
    assert "captions" not in plain.header()
    random = load_recipe("style", {"captions.lines": "random"})
    assert random.header()["captions"] == {"lines": "random"}
    with pytest.raises(DiffgraftError, match=r"Invalid value captions\.lines='some'"):
        load_recipe("style", {"captions.lines": "some"})


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a {red|blue} sks dog", "alternatives in braces"),
        ("a (sks dog:1.3)", "weights in brackets"),
        ("sks dog <lora:ink:0.8>", "adapters"),
        ("a ((sks dog))", "weights in brackets"),
        ("sks dog in {place}", "placeholders without a value"),
        ("sks dog in { place }", "placeholders without a value"),
        ("sks dog in __place__", "placeholders without a value"),
    ],
)
def test_captions_written_as_for_drawing_are_told_of(base: Base, tmp_path: Path, caption: str, said: str) -> None:
    data = folder(tmp_path / "data", 1)
    (data / "00.txt").write_text(caption, "utf-8")
    with pytest.warns(UserWarning, match=f"caption of 00.png has {said}"):
        items_of(base, SUBJECT, images=str(data), subject="dog")


def test_a_mask_that_leaves_nothing_is_refused(base: Base, tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 2, (64, 64))
    Image.new("L", (64, 64), 0).save(data / "00_mask.png")
    with pytest.raises(DiffgraftError, match=r"mask 00_mask\.png leaves nothing of 00\.png to train on"):
        items_of(base, "style", images=str(data), **{"masks.use": True})
    assert len(items_of(base, "style", images=str(data), **{"masks.use": True, "masks.outside": 0.1})[1]) == 2
    assert "masks of 00.png are not used" in str(plan_run("style", {"images": data}))
    wide = folder(tmp_path / "wide", 1, (128, 64))
    mask = Image.new("L", (128, 64), 0)
    mask.paste(255, (0, 0, 20, 64))  # white where a square from the middle does not reach
    mask.save(wide / "00_mask.png")
    with pytest.raises(DiffgraftError, match="leaves nothing"):
        items_of(base, "style", images=str(wide), **{"masks.use": True})
    assert items_of(base, "style", images=str(wide), **{"masks.use": True, "buckets.use": True})


def test_each_concept_gives_its_share_to_validation(base: Base, tmp_path: Path) -> None:
    names = {"ohwx": 6, "zwx": 3, "qwx": 1}
    for number, (name, count) in enumerate(names.items()):
        folder(tmp_path / "data" / f"1_{name} man", count, start=10 * number)
    recipe, items = items_of(base, SUBJECT, images=str(tmp_path / "data"), **PLAIN, **{"validation.share": 0.34})
    learnt, held = split_samples(recipe.data, recipe.validation, items, base)
    counts = {name: sum(one.concept.trigger == name for one in held) for name in names}
    assert counts == {"ohwx": 2, "zwx": 1, "qwx": 0}
    assert len(learnt) + len(held) == 10
    assert all(one.prompt_builder.prompts() == [f"{one.concept.trigger} man"] for one in held)
    recipe, items = items_of(base, SUBJECT, images=str(tmp_path / "data"), **PLAIN, **{"validation.share": 0.01})
    assert [one.concept.trigger for one in split_samples(recipe.data, recipe.validation, items, base)[1]] == ["ohwx"]


@pytest.mark.parametrize(
    ("share", "upwards", "downwards"),
    [(0.34, {0, 1, 6}, {4, 5, 8}), (0.6, {0, 1, 2, 3, 6, 7}, {2, 3, 4, 5, 7, 8}), (0.01, {0}, {5})],
)
def test_a_share_is_one_of_each_concept_wherever_the_least_contents_are(
    share: float, upwards: set[int], downwards: set[int]
) -> None:
    """No concept is held out whole, and a share of less than one picture is one of the largest concept."""
    concepts, contents = [0] * 6 + [1] * 3 + [2], [f"{row:02}" for row in range(10)]
    assert rows_held_out(share, concepts, contents) == upwards
    assert rows_held_out(share, concepts, contents[::-1]) == downwards


def test_pictures_of_validation_in_one_folder_belong_to_the_concepts_that_their_captions_name(
    base: Base, tmp_path: Path
) -> None:
    for number, name in enumerate(("ohwx man", "zwx man")):
        folder(tmp_path / "data" / f"1_{name}", 1, start=10 * number)
    flat = folder(tmp_path / "flat", 3, start=30)
    for number, caption in enumerate(("zwx man at sea", "ohwx man at sea", "a man at sea, zwx")):
        (flat / f"{30 + number}.txt").write_text(caption, "utf-8")
    settings: dict[str, Any] = {"images": str(tmp_path / "data"), **PLAIN, "validation.images": str(flat)}
    recipe, items = items_of(base, SUBJECT, **settings)
    _, held = split_samples(recipe.data, recipe.validation, items, base)
    assert {one.picture.name: one.concept.trigger for one in held} == {
        "30.png": "zwx",
        "31.png": "ohwx",
        "32.png": "zwx",
    }


def test_a_numbered_folder_of_validation_that_names_no_concept_is_refused(base: Base, tmp_path: Path) -> None:
    for number, name in enumerate(("ohwx man", "zwx man")):
        folder(tmp_path / "data" / f"1_{name}", 1, start=10 * number)
    folder(tmp_path / "held" / "1_man", 1, start=30)
    settings: dict[str, Any] = {"images": str(tmp_path / "data"), **PLAIN, "validation.images": str(tmp_path / "held")}
    recipe, items = items_of(base, SUBJECT, **settings)
    with pytest.raises(DiffgraftError, match=r"concept of the validation images in .*1_man is unknown: put its"):
        split_samples(recipe.data, recipe.validation, items, base)


def test_pictures_of_validation_are_judged_by_their_own_words(base: Base, tmp_path: Path) -> None:
    for number, name in enumerate(("ohwx man", "zwx man")):
        folder(tmp_path / "data" / f"1_{name}", 2, start=10 * number)
        folder(tmp_path / "held" / f"1_{name}", 1, start=10 * number + 5)
    given: dict[str, Any] = {"images": str(tmp_path / "data"), **PLAIN}
    recipe, items = items_of(base, SUBJECT, **given, **{"validation.images": str(tmp_path / "held")})
    _, held = split_samples(recipe.data, recipe.validation, items, base)
    assert [one.prompt_builder.prompts() for one in held] == [["ohwx man"], ["zwx man"]]
    flat = folder(tmp_path / "flat", 2, start=30)
    (flat / "30.txt").write_text("zwx man at sea", "utf-8")
    recipe, items = items_of(base, SUBJECT, **given, **{"validation.images": str(flat)})
    for caption in ("", "a fox at sea", "a man at sea"):  # the last is of both concepts
        (flat / "31.txt").write_text(caption or "zwx", "utf-8")
        if not caption:
            (flat / "31.txt").unlink()
        with pytest.raises(DiffgraftError, match=r"name no concept \(31\.png\), but the run has several"):
            split_samples(recipe.data, recipe.validation, items, base)
    folder(tmp_path / "both", 1)
    folder(tmp_path / "both" / "1_zwx man", 1, start=50)
    with pytest.raises(DiffgraftError, match=r"zwx man \(1 x 1\)\. Move the pictures that are not meant"):
        split_samples(recipe.data, Validation(images=str(tmp_path / "both")), items, base)
    one: dict[str, Any] = {**given, "images": str(tmp_path / "data" / "1_ohwx man"), "trigger": "ohwx"}
    folder(tmp_path / "noun" / "1_man", 1, start=40)
    recipe, items = items_of(base, SUBJECT, **one, **{"validation.images": str(tmp_path / "noun")})
    assert [one.prompt_builder.prompts() for one in split_samples(recipe.data, recipe.validation, items, base)[1]] == [
        ["a ohwx man"]
    ]
