"""The tables of keys: each is a key of the tool it stands for, and none of the tool's is missing."""

from pathlib import Path

import pytest

from diffgraft.imports import kohya_data, kohya_gui, kohya_keys, onetrainer_keys
from diffgraft.imports.kohya_network import NETWORK
from diffgraft.trainers.recipe.recipe import TASKS

HERE = Path(__file__).parent
OF_THE_GUI = {"num_processes", "num_machines", "multi_gpu", "gpu_ids", "train_inpainting", "epoch", "noise_offset_type"}
OF_DATA_SETS = {"custom_attributes", "network_multiplier"}
MADE_HERE = {"gui_epoch"}


def names(tool: str) -> set[str]:
    """The tool's own keys, as read from its source."""
    return set((HERE / f"{tool}.txt").read_text("utf-8").split())


def test_all_arguments_of_sd_scripts_are_known_and_no_others() -> None:
    assert set(kohya_keys.DEFAULTS) == names("sd-scripts") | OF_THE_GUI | OF_DATA_SETS | MADE_HERE
    assert names("kohya-gui") >= OF_THE_GUI


def test_all_keys_of_its_data_sets_are_known_and_no_others() -> None:
    assert {*kohya_data.SHARED, *kohya_data.PER_SUBSET, "subsets"} == names("sd-scripts-datasets")
    assert names("sd-scripts-datasets") >= OF_DATA_SETS


def test_all_keys_of_the_gui_are_known_and_no_others() -> None:
    groups = (kohya_gui.IDLE, kohya_gui.READ, kohya_gui.ARGUMENTS, kohya_gui.RENAMED, kohya_gui.FAMILIES)
    known = {key for group in groups for key in group}
    assert known <= names("kohya-gui")
    left = names("kohya-gui") - known - set(kohya_keys.DEFAULTS)
    assert {key for key in left if not kohya_gui.OTHERS.match(key)} == set()
    assert not any(kohya_gui.OTHERS.match(key) for key in names("sd-scripts"))


def test_all_keys_of_onetrainer_are_known_and_no_others() -> None:
    keys = onetrainer_keys
    known = {
        *keys.DEFAULTS,
        *(f"optimizer.{key}" for key in {*keys.OPTIMIZER_SETTINGS, *keys.OPTIMIZER_IDLE}),
        *(f"concepts.{key}" for key in keys.CONCEPT),
        *(f"concepts.image.{key}" for key in keys.CONCEPT_IMAGE),
        *(f"concepts.text.{key}" for key in keys.CONCEPT_TEXT),
    }
    theirs = {key for key in names("onetrainer") if key.partition(".")[0] not in keys.APART}
    assert known <= theirs
    assert theirs - known == {"unet", "vae", "text_encoder", "text_encoder_2", "embedding", "optimizer"}  # groups


@pytest.mark.parametrize("table", [kohya_keys.MAPPED, onetrainer_keys.MAPPED, NETWORK])
def test_what_they_become_are_keys_of_recipes(table: dict[str, kohya_keys.KeyRule]) -> None:
    fields = TASKS["style"].model_fields
    for rule in table.values():
        outer, dot, inner = rule.recipe_key.partition(".")
        if rule.recipe_key:
            assert outer in fields
            annotation = fields[outer].annotation
            assert not dot or inner in getattr(annotation, "model_fields", {})


def test_what_has_no_counterpart_says_why_in_a_sentence() -> None:
    for table in (kohya_keys.UNSUPPORTED, onetrainer_keys.UNSUPPORTED):
        assert all(rule.why.endswith(".") and len(rule.why.split()) > 3 for rule in table.values())
