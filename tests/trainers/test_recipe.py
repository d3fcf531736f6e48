"""Recipes: all that ship are sound, and what a person gets wrong is answered with what is right."""

from pathlib import Path
from typing import Any

import pytest

from diffgraft.adapters.registry import get_method, methods
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.files import described_keys, load_recipe, recipe_names, save_recipe
from diffgraft.trainers.recipe.recipe import TASKS, SubjectRecipe
from tests.recipes import ON_PICTURES, SUBJECT

SHIPPED = list(recipe_names())
SOURCES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_that_ships_is_sound(name: str) -> None:
    first, second, *_ = (SOURCES / f"{name}.yaml").read_text("utf-8").splitlines()
    assert first.startswith(f"# diffgraft train {name} ")
    assert second.startswith("# ")
    assert len(recipe_names()[name]) < 100
    given = dict(word.split("=") for word in first.split()[4:])
    recipe = load_recipe(name, given)
    assert recipe.images == given.get("images", "")
    for prompt in recipe.samples():
        assert "{" not in prompt


def test_all_recipes_are_listed() -> None:
    assert sorted(SHIPPED) == sorted(file.stem for file in SOURCES.glob("*.yaml"))


def test_the_keys_every_recipe_has() -> None:
    for kind in TASKS.values():
        promised = "base method rank alpha images output steps seed checkpoint_every lr batch resolution"
        assert set(promised.split()) <= set(kind.model_fields)
        for name, field in kind.model_fields.items():
            assert field.description, name


def test_words_from_a_command_line_become_values() -> None:
    settings = {
        "subject": "dog",
        "lr": "1e-4",
        "rank": "3",
        "prior.weight": "0.5",
        "flip": "true",
        "sample_prompts": "a | b",
    }
    recipe = load_recipe("dreambooth-lora", settings)
    assert isinstance(recipe, SubjectRecipe)
    assert (recipe.lr, recipe.rank, recipe.prior.weight, recipe.flip) == (1e-4, 3, 0.5, True)
    assert recipe.samples() == ["a", "b"]
    assert recipe.alpha_or_rank() == 3.0
    assert load_recipe(SUBJECT, {"subject": "dog", "alpha": "1.5"}).alpha_or_rank() == 1.5


def test_a_saved_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("sd15-subject", {"subject": "dog", "images": "my dog/", "prior.images": 7, "output": "there"})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml", {"output": "there"}) == recipe
    assert load_recipe(tmp_path / "recipe.yaml", {}).output == ""


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_goes_with_every_method_of_its_kind(name: str, tmp_path: Path) -> None:
    """What a recipe says for its own method does not trouble another, and what is saved can be loaded again."""
    for method in methods():
        if (method in ON_PICTURES) == name.endswith("control"):
            given = {"subject": "dog"} if name.endswith("subject") else {}
            with pytest.raises(DiffgraftError, match="condition pictures"):
                load_recipe(name, {**given, "method": method})
            continue
        subject = {"subject": "dog"} if name.endswith(("subject", "concept")) else {}
        recipe = load_recipe(name, {**subject, "method": method})
        get_method(method).read_options(recipe.options)
        save_recipe(recipe, tmp_path / "recipe.yaml")
        assert load_recipe(tmp_path / "recipe.yaml", {}) == recipe, method


def test_a_recipe_has_settings_of_its_own_for_a_method(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "task: style\nlr: 1e-3\nsteps: 9\nmethods:\n  full: {lr: 1e-5}\n  loha: {options: {tucker: true}}\n", "utf-8"
    )
    assert load_recipe(path, {}).lr == 1e-3
    assert (load_recipe(path, {"method": "full"}).lr, load_recipe(path, {"method": "full"}).steps) == (1e-5, 9)
    assert load_recipe(path, {"method": "full", "lr": 2e-5}).lr == 2e-5
    assert load_recipe(path, {"method": "loha", "options.conv_rank": "2"}).options == {"tucker": True, "conv_rank": "2"}
    for text, answer in (
        ("  ful: {lr: 1e-5}", "There is no method 'ful': did you mean 'full'"),
        ("  full: {ler: 1e-5}", "Unknown setting 'ler'"),
        ("  full: 3", "Invalid methods: of the recipe"),
    ):
        path.write_text(f"task: style\nmethods:\n{text}\n", "utf-8")
        with pytest.raises(DiffgraftError, match=answer):
            load_recipe(path, {"method": "full"})


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        (
            {"method": "textual-inversion", "rank": 4},
            "rank is not supported by method=textual-inversion: it has no low-rank",
        ),
        ({"method": "textual-inversion", "prior.weight": 1}, "prior is not supported by method=textual-inversion"),
        ({"method": "hypernetwork", "text_encoder": "true"}, "text_encoder is not supported by method=hypernetwork"),
        ({"method": "full", "alpha": 4}, "alpha is not supported by method=full: .*options.rank"),
        (
            {"method": "pivotal", "options.weights": "full", "rank": 4},
            "rank is not supported by method=pivotal: with options.weights=full, .*options.weights_options.rank",
        ),
        (
            {"method": "pivotal", "options.weights": "hypernetwork", "layers": "all"},
            "layers is not supported by method=pivotal",
        ),
        ({"method": "lorra"}, "did you mean 'lora'"),
    ],
)
def test_a_setting_that_means_nothing_to_the_method_is_refused(settings: dict[str, Any], answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        load_recipe(SUBJECT, {"subject": "dog", **settings})
    load_recipe(SUBJECT, {"subject": "dog", "method": "textual-inversion", "prior.weight": 0, "text_encoder": "no"})


@pytest.mark.parametrize(
    ("name", "settings", "answer"),
    [
        ("subjcet", {}, "did you mean 'subject'"),
        ("none-such.yaml", {}, "Unknown recipe"),
        ("subject", {"subject": "dog", "stepps": 3}, "did you mean 'steps'"),
        ("subject", {"subject": "dog", "prior.wieght": 3}, "did you mean 'prior.weight'"),
        ("subject", {"subject": "dog", "steps.more": 3}, "Unknown setting 'steps.more'"),
        ("style", {"subject": "dog"}, "Unknown setting 'subject' for a style recipe"),
        ("subject", {}, "requires 'subject'"),
        (
            "subject",
            {"subject": "dog", "steps": "many"},
            "Invalid value steps='many': .*Meaning of steps: Number of optimizer steps",
        ),
        ("subject", {"subject": "dog", "rank": 0}, "Invalid value rank=0: must be greater than or equal to 1"),
        ("subject", {"subject": "dog", "precision": "half"}, "float32"),
        ("subject", {"subject": "dog", "prior.images": "x"}, "Number of class images"),
        ("subject", {"subject": "dog", "alpha": 0}, "greater than 0"),
        ("subject", {"subject": "dog", "lr": "inf"}, "finite"),
        ("subject", {"subject": "dog", "seed": 10**20}, "less than"),
        (
            "subject",
            {"subject": "dog", "sample_prompts": "a {triger} dog"},
            "Unknown placeholder {triger} in sample_prompts",
        ),
        (
            "subject",
            {"subject": "dog", "prompt": "a {triger} dog"},
            "Unknown placeholder {triger}.*did you mean '{trigger}'",
        ),
    ],
)
def test_mistakes_are_answered(name: str, settings: dict[str, Any], answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        load_recipe(name, settings)


def test_files_that_are_no_recipes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, answer in (
        ("- a\n- b\n", "has no keys"),
        ("a: [", "not readable YAML"),
        ("task: subjct\n", "Invalid task 'subjct'"),
        ("task: [subject]\n", "Invalid task"),
        ("task: subject\nsubject: dog\nprior: 5\n", "Invalid value prior=5: prior is a group"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(DiffgraftError, match=answer):
            load_recipe(path, {})
    path.write_text("task: subject\nsubject: dog\nsetps: 4\n", "utf-8")
    with pytest.raises(DiffgraftError, match="did you mean 'steps'"):
        load_recipe(path, {})


def test_the_header_holds_neither_paths_nor_defaults() -> None:
    header = load_recipe(SUBJECT, {"subject": "dog", "images": "/home/me/dog", "output": "/tmp/x", "rank": 4}).header()
    tuned = {"lr": 1.5e-3, "steps": 400, "prior": {"weight": 2.0}}  # what the recipe's file has
    assert header == {"task": "subject", "subject": "dog", "rank": 4, **tuned}


def test_under_a_cosine_the_number_of_steps_is_part_of_what_a_step_does() -> None:
    def essence(**settings: object) -> str:
        return load_recipe(SUBJECT, {"subject": "dog", **settings}).fingerprint()

    assert essence(steps=5) == essence(steps=6)
    assert essence(steps=5, lr_schedule="cosine") != essence(steps=6, lr_schedule="cosine")


@pytest.mark.parametrize("name", recipe_names())
def test_every_key_is_explained_by_what_one_would_type(name: str) -> None:
    rows = described_keys(name)
    assert all(meaning for _, _, meaning in rows)
    assert len({key for key, _, _ in rows}) == len(rows) > 60
    own = {"subject": "dog"} if name.endswith("subject") else {}
    typed = {key: value for key, value, _ in rows if value}
    assert load_recipe(name, {**typed, **own}) == load_recipe(name, own)


def test_a_group_of_keys_is_no_key() -> None:
    with pytest.raises(
        DiffgraftError, match=r"Invalid value buckets='true': buckets is a group; set one of its keys: buckets\.use, "
    ):
        load_recipe(SUBJECT, {"subject": "dog", "buckets": "true"})


def test_keys_with_few_values_tell_them() -> None:
    meanings = {key: meaning for key, _, meaning in described_keys("subject")}
    assert meanings["prior.by"].endswith("(pictures, prediction)")
    assert meanings["attention"].endswith("(default, plain, xformers, sliced)")
    assert not meanings["lr"].endswith(")")


def test_a_recipe_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes("task: style\nprompt: a café, {trigger}\n".encode("latin-1"))
    with pytest.raises(DiffgraftError, match=r"mine\.yaml is not UTF-8 \(line 2\): save it as UTF-8"):
        load_recipe(path, {})


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    for text in ("task: style\nrank: 4\nrank: 8\n", "task: style\nloss:\n  kind: huber\n  kind: l2\n"):
        path.write_text(text, "utf-8")
        with pytest.raises(
            DiffgraftError, match=r"not readable YAML \(line \d, column \d\): the key '(rank|kind)' occurs twice"
        ):
            load_recipe(path, {})


def test_keys_with_dots_stand_in_files_as_well(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("task: style\nprior.weight: 0.5\nlr_scale.unet: 2\nprior.images: 7\n", "utf-8")
    found = load_recipe(path, {"prior.images": 9})
    assert (found.prior.weight, found.prior.images, found.lr_scale) == (0.5, 9, {"unet": 2})  # type: ignore[attr-defined]


def test_captions_have_a_word_and_keys_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("task: style\ncaptions: false\n", "utf-8")
    found = load_recipe(path, {"captions.lines": "join"})
    assert (found.captions.use, found.captions.lines) == (False, "join")
    save_recipe(found, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml", {}).captions == found.captions
    assert {"captions.use", "captions.lines"} <= {key for key, _, _ in described_keys("style")}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"task: subject\n  lr: [1, 2\nsteps: 3\n", r"not readable YAML \(line 2, column"),
        (b"task: \x00", "not readable YAML"),
        ("task: subject\nsubject: Häuschen".encode("latin-1"), r"is not UTF-8 \(line 2\)"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", r"the alias \*a \(line 2\)"),
        (b"[" * 5000, "not readable YAML"),
        (b"a: 1\n" * 300_000, "is larger than"),
        (b"- a\n- b\n", "has no keys"),
    ],
)
def test_recipes_that_cannot_be_read(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(DiffgraftError, match=said) as caught:
        load_recipe(path, {})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
