"""Who types what another tool calls a setting is told what it is called here."""

import pytest

from diffgraft.adapters.registry import methods
from diffgraft.cli.console import key_values
from diffgraft.errors import DiffgraftError
from diffgraft.imports.kohya_keys import MAPPED as KOHYA
from diffgraft.imports.onetrainer_keys import MAPPED as ONETRAINER
from diffgraft.trainers.recipe.files import _keys, load_recipe
from diffgraft.trainers.recipe.recipe import TASKS
from diffgraft.trainers.recipe.synonyms import _SYNONYMS, synonym
from tests.recipes import SUBJECT


def test_every_synonym_stands_for_a_setting_that_there_is() -> None:
    options = {f"options.{name}" for method in methods().values() for name in method.options.model_fields}
    known = {key for kind in TASKS.values() for key in _keys(kind)} | options
    known |= {"lr_scale.text_encoder"}
    assert {*_SYNONYMS.values()} <= known
    assert not {*_SYNONYMS} & known


def test_keys_of_imported_configurations_are_synonyms() -> None:
    plain = {
        theirs: rule.recipe_key for table in (ONETRAINER, KOHYA) for theirs, rule in table.items() if rule.recipe_key
    }
    assert {theirs for theirs, ours in plain.items() if theirs != ours and not synonym(theirs)} == set()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("network_dim", "rank"),
        ("learning_rate", "lr"),
        ("max_train_steps", "steps"),
        ("train_batch_size", "batch"),
        ("dora", "options.dora"),
        ("torch_dtype", "precision"),
        ("Train-Batch-Size", "batch"),
        ("caption_tag_dropout_rate", "tags.drop"),
    ],
)
def test_keys_of_other_tools_get_ours_as_the_hint(theirs: str, ours: str) -> None:
    with pytest.raises(DiffgraftError, match=rf"Unknown setting '{theirs}' .*: in diffgraft it is called '{ours}'\."):
        load_recipe(SUBJECT, {"subject": "dog", theirs: "1"})


def test_strange_keys_get_the_three_nearest() -> None:
    with pytest.raises(DiffgraftError, match=r"the nearest are: \w+, [\w.]+, [\w.]+\.$"):
        load_recipe(SUBJECT, {"subject": "dog", "xyzzy": "1"})
    with pytest.raises(DiffgraftError, match="did you mean 'steps'"):
        load_recipe(SUBJECT, {"subject": "dog", "step": "1"})


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--rank", "8"], r"write rank=8 in the place of --rank\."),
        (["--learning-rate=1e-4"], r"write lr=1e-4 in the place of --learning-rate=1e-4\."),
        (["--dora", "steps=3"], r"write options.dora=true in the place of --dora\."),
        (["--flip"], r"write flip=true in the place of --flip\."),
    ],
)
def test_options_of_other_tools_are_told_as_settings(words: list[str], answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        key_values(words)
