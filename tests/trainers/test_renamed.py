"""Former names of recipe keys, options and arguments work for one release, and warn with the current name."""

import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffgraft.adapters.registry import methods
from diffgraft.bases import Base
from diffgraft.cli.main import app
from diffgraft.cli.renamed import RENAMED as OPTIONS
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.hooks.checkpoint import _read_state, _write_state, checkpoints
from diffgraft.trainers.recipe.files import _keys, load_recipe, save_recipe
from diffgraft.trainers.recipe.recipe import TASKS
from diffgraft.trainers.recipe.renamed import RENAMED, current_key
from diffgraft.trainers.run.train import train
from tests.conftest import SHORT
from tests.recipes import SUBJECT


def test_every_renamed_key_is_a_key_today() -> None:
    options = {f"options.{name}" for method in methods().values() for name in method.options.model_fields}
    keys = {key for kind in TASKS.values() for key in _keys(kind)} | options
    keys |= {f"options.weights_options.{key.removeprefix('options.')}" for key in options}
    assert {current_key(former) for former in RENAMED} <= keys
    assert not {former for former in RENAMED if former.count(".") < 2} & keys


@pytest.mark.parametrize(
    ("settings", "current"),
    [
        ({"rates.text_encoder": "0.5"}, {"lr_scale.text_encoder": "0.5"}),
        ({"rates": {"unet": 2, "OUT*": 0}}, {"lr_scale": {"unet": 2, "OUT*": 0}}),
        (
            {"timesteps": {"first": 5, "spread": "logit-normal"}},
            {"timesteps": {"min": 5, "distribution": "logit-normal"}},
        ),
        ({"timesteps.last": 700, "timesteps.width": 2.5}, {"timesteps.max": 700, "timesteps.std": 2.5}),
        ({"buckets.least": 48, "buckets.most": 96}, {"buckets.min": 48, "buckets.max": 96}),
        ({"options.up_rate": 16}, {"options.loraplus_ratio": 16}),
        ({"method": "lokr", "options": {"split_both": True}}, {"method": "lokr", "options": {"decompose_both": True}}),
        (
            {"method": "pivotal", "options.of_weights.up_rate": 4, "options.word_rate": 3},
            {"method": "pivotal", "options.weights_options.loraplus_ratio": 4, "options.token_lr_scale": 3},
        ),
    ],
)
def test_former_keys_mean_the_current_ones(settings: dict[str, object], current: dict[str, object]) -> None:
    with pytest.warns(UserWarning, match="is now called") as shown:
        recipe = load_recipe(SUBJECT, {"subject": "dog", **settings})
    assert recipe == load_recipe(SUBJECT, {"subject": "dog", **current})
    assert recipe != load_recipe(SUBJECT, {"subject": "dog"})
    for warning in shown:
        former, new = str(warning.message).removeprefix("The setting ").split(" is now called ")
        assert new.startswith(current_key(former))


def test_a_key_under_both_names_is_refused() -> None:
    with pytest.raises(DiffgraftError, match=r"timesteps\.first was renamed to timesteps\.min, and both are given"):
        load_recipe(SUBJECT, {"subject": "dog", "timesteps": {"first": 5, "min": 6}})


def test_recipes_of_a_person_and_of_a_run_may_have_former_keys(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "task: subject\nsubject: dog\nrates: {unet: 2}\nmethods: {pivotal: {options: {word_rate: 9}}}\n", "utf-8"
    )
    with pytest.warns(UserWarning, match="is now called"):
        recipe = load_recipe(mine, {})
    assert recipe.lr_scale == {"unet": 2}
    save_recipe(recipe, tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text("utf-8")
    (tmp_path / "recipe.yaml").write_text(text.replace("lr_scale:", "rates:"), "utf-8")
    with warnings.catch_warnings():  # nobody wrote this file by hand: no warning
        warnings.simplefilter("error")
        assert load_recipe(tmp_path / "recipe.yaml", {}) == recipe


def test_a_run_of_the_release_before_goes_on(base: Base, pictures: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "images": pictures, "lr_scale": {"unet": 2, "M00": 1}, "timesteps": {"min": 100}}
    run = train(SUBJECT, base=base, output=tmp_path / "run", **{**settings, "steps": 3})
    for folder in checkpoints(run.folder):
        state = _read_state(folder)
        recipe = state["identity"]["recipe"]
        recipe["rates"] = recipe.pop("lr_scale")
        recipe["timesteps"] = {"first": recipe["timesteps"].pop("min"), **recipe["timesteps"]}
        recipe["order"]["rates"] = recipe["order"].pop("lr_scale")
        _write_state(folder, state)
    again = train(base=base, resume=run.folder, steps=4)
    assert again.steps == 4
    with pytest.warns(UserWarning, match="is now called allow_changes"):
        train(base=base, resume=run.folder, steps=5, changed=True, lr=0.002)


@pytest.mark.parametrize(("command", "former"), [(name, former) for name, table in OPTIONS.items() for former in table])
def test_former_options_are_taken_with_a_warning(command: str, former: str) -> None:
    current = OPTIONS[command][former]
    assert current in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    words = {"train": [], "caption": ["nowhere"], "combine": ["nowhere", "-o", "x"]}[command]
    value = {"--changed": [], "--most": ["5"]}.get(former, ["dare"])
    with pytest.warns(UserWarning, match=f"The option {former} is now called {current}"):
        result = CliRunner().invoke(app, [command, *words, former, *value])
    assert isinstance(result.exception, DiffgraftError), result.output


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"timesteps.first": 5, "timesteps": {"min": 6}}, "timesteps.min"),
        ({"options.up_rate": 4, "options": {"loraplus_ratio": 5}}, "options.loraplus_ratio"),
        ({"rates": {"unet": 2}, "lr_scale.unet": 3}, "lr_scale.unet"),
        ({"lr_scale.M00": 3, "lr_scale": {"M00": 2}}, "lr_scale.M00"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is now called")
def test_a_key_given_twice_in_other_forms_is_refused(values: dict[str, object], key: str) -> None:
    with pytest.raises(DiffgraftError, match=f"The setting {key} is given twice"):
        load_recipe(SUBJECT, {"subject": "dog", **values})


def test_nested_and_dotted_entries_of_one_mapping_are_joined() -> None:
    recipe = load_recipe(SUBJECT, {"subject": "dog", "lr_scale.M00": 3, "lr_scale": {"unet": 2}})
    assert recipe.lr_scale == {"unet": 2, "M00": 3}


def test_the_same_values_as_text_are_no_change(base: Base, pictures: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "images": pictures, "lr_scale": {"unet": 2, "M00": 1}, "options": {"loraplus_ratio": 4}}
    run = train(SUBJECT, base=base, output=tmp_path / "run", **{**settings, "steps": 2})
    text = {"options": {"loraplus_ratio": "4"}, "lr_scale": {"unet": "2"}}
    assert train(base=base, resume=run.folder, steps="3", **text).steps == 3
    with pytest.raises(DiffgraftError, match=r"options\.loraplus_ratio: 4 → 5"):
        train(base=base, resume=run.folder, steps=4, options={"loraplus_ratio": "5"})
    with pytest.raises(DiffgraftError, match="order of lr_scale"):
        train(base=base, resume=run.folder, steps=4, lr_scale={"unet": 3})


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"lr_scale": 5}, r"set its entries, as in lr_scale\.NAME=VALUE"),
        ({"lr_scale": {1: 2}}, "Invalid name 1 in lr_scale: must be text"),
        (
            {"concepts": [{"images": "a", "lr_scale": {"unet": 2}}]},
            r"a concept can have images, trigger, .*prior; set others",
        ),
    ],
)
def test_mistakes_in_mappings_and_concepts_are_answered(settings: dict[str, object], answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        load_recipe(SUBJECT, {"subject": "dog", **settings})
