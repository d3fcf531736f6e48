"""Recipes: what to train and how, as data; a file states only what differs from the defaults here.

A recipe is flat for those who write it. Inside it is groups: `recipe.model`, `recipe.adapter`, `recipe.data`,
`recipe.optim`, `recipe.objective`, `recipe.runtime` and `recipe.outputs`, each frozen, of which functions take those
that they need.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from diffgraft.data.captions import without_word
from diffgraft.trainers.recipe.groups import (
    AdapterSettings,
    DataSettings,
    Group,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    OutputSettings,
    RuntimeSettings,
)
from diffgraft.trainers.recipe.settings import Concept, Prior

G = TypeVar("G", bound=Group)

FREE = (
    *("images", "layout", "outside", "base", "init_from", "output", "cache"),
    *("checkpoint_every", "sample_every", "sample_prompts", "adapter_every", "trackers", "format", "previews"),
)
"""Keys that decide nothing about what a step does, or that the digest of the data and hashes of files stand for"""


# pydantic takes the keys of the last class first
class Recipe(
    OutputSettings, RuntimeSettings, ObjectiveSettings, OptimSettings, DataSettings, AdapterSettings, ModelSettings
):
    """The keys every recipe has."""

    task: str
    """What kind of training this is; fixed by the recipe's file"""
    concepts: list[Concept] = Field(default_factory=list)
    """Several things learnt at once, each with pictures and words of its own, in the place of `images`"""

    default_samples: ClassVar[tuple[str, ...]] = ()
    data_group: ClassVar[type[DataSettings]] = DataSettings
    """The group of pictures and prompts, with what the task has besides"""

    @property
    def model(self) -> ModelSettings:
        return self._group(ModelSettings)

    @property
    def adapter(self) -> AdapterSettings:
        return self._group(AdapterSettings)

    @property
    def data(self) -> DataSettings:
        return self._group(self.data_group)

    @property
    def optim(self) -> OptimSettings:
        return self._group(OptimSettings)

    @property
    def objective(self) -> ObjectiveSettings:
        return self._group(ObjectiveSettings)

    @property
    def runtime(self) -> RuntimeSettings:
        return self._group(RuntimeSettings)

    @property
    def outputs(self) -> OutputSettings:
        return self._group(OutputSettings)

    def groups(self) -> list[Group]:
        """All of its groups."""
        return [self.model, self.adapter, self.data, self.optim, self.objective, self.runtime, self.outputs]

    def _group(self, kind: type[G]) -> G:
        values = {name: getattr(self, name) for name in kind.model_fields}
        return kind.model_construct(_fields_set=self.model_fields_set & values.keys(), **values)

    def samples(self) -> list[str]:
        """The prompts to draw, filled in; some for each concept, where none are given."""
        if self.sample_prompts or not self.concepts:
            return [self.fill(prompt) for prompt in self.sample_prompts or self.default_samples]
        few = (*self.default_samples[:2], *self.default_samples[-1:])
        return list(dict.fromkeys(part.fill(prompt) for prompt in few for part in self.parts()))

    def parts(self) -> list[DataSettings]:
        """Pictures and prompts of each concept: the recipe's own, with the concept's keys; itself without concepts."""
        own = ({key: getattr(one, key) for key in one.model_fields_set} for one in self.concepts)
        return [self.data.model_copy(update=keys) for keys in own] or [self.data]

    def folders(self) -> list[str]:
        """All folders with pictures that it names: to learn from, to validate with, of classes."""
        parts = self.parts()
        priors = [prior for part in (self, *parts) if (prior := getattr(part, "prior", None)) is not None]
        named = (self.images, *(part.images for part in parts), self.validation.images, *(one.folder for one in priors))
        return [one for one in dict.fromkeys(named) if one]

    def fingerprint(self) -> dict[str, Any]:
        """Everything in the recipe that decides what a step does; a run goes on under the same, unless one insists."""
        paths: dict[str, Any] = dict.fromkeys(FREE, True)
        if self.lr_schedule == "constant":  # the number of steps then decides when it ends, and nothing before
            paths["steps"] = True
        paths |= {"concepts": {"__all__": {"images"}}, "validation": {"images", "every", "pairs", "patience"}}
        options = {f"options.{name}": value for name, value in self.options.items() if isinstance(value, dict)}
        orders = {name: [*keys] for name, keys in {"lr_scale": self.lr_scale, **options}.items() if len(keys) > 1}
        return {**self.model_dump(mode="json", exclude=paths), "order": orders}  # of patterns the last counts

    def header(self) -> dict[str, Any]:
        """What an adapter file says of the recipe: neither times nor paths, so that equal runs give equal files."""
        paths: dict[str, Any] = dict.fromkeys(
            ("images", "output", "base", "init_from", "cache", "trackers", "format", "previews"), True
        )
        paths |= {"concepts": {"__all__": {"images"}}, "validation": {"images"}, "prior": {"folder"}}
        said = self.model_dump(mode="json", exclude=paths, exclude_defaults=True)
        return {"task": self.task, **said}

    def with_absolute_paths(self, folder: Path) -> "Recipe":
        """The recipe of a run in `folder`, its paths such that they hold wherever it is read again."""

        def placed(group: Any) -> Any:
            update: dict[str, Any] = {"images": absolute(group.images)} if group.images else {}
            prior = getattr(group, "prior", None)
            if prior is not None and prior.folder:
                update["prior"] = prior.model_copy(update={"folder": absolute(prior.folder)})
            return update

        return self.model_copy(
            update={
                **placed(self),
                "init_from": absolute(self.init_from) if self.init_from else "",
                "output": str(folder),
                "base": self.base if self.base == "tiny" else absolute(self.base),
                "concepts": [one.model_copy(update=placed(one)) for one in self.concepts],
                "validation": self.validation.model_copy(update=placed(self.validation)),
            }
        )


def absolute(path: str) -> str:
    """The absolute path of a folder or file; what is neither, such as an id on the hub, as it is."""
    found = Path(path).expanduser()
    return str(found.resolve()) if found.exists() else path


class SubjectData(DataSettings):
    """Pictures of one subject."""

    subject: str = Field(..., min_length=1)
    """The class noun of what the pictures show: dog, backpack, teapot"""
    prompt: str = "a {trigger} {subject}"
    """Prompt of every instance picture without a caption"""
    class_prompt: str = "a {subject}"
    """Prompt of the class images"""
    prior: Prior = Field(default_factory=lambda: Prior(weight=1.0, images=64))
    """Prior preservation: its weight and its pictures"""

    def class_text(self, caption: str | None) -> str:  # noqa: ARG002
        return self.fill(self.class_prompt)

    def class_prompts(self, captions: Sequence[str | None]) -> list[str]:
        return [self.class_text(None)] if captions else []


class SubjectRecipe(SubjectData, Recipe):
    """DreamBooth: one subject from a few pictures of it."""

    task: Literal["subject"] = "subject"
    """What kind of training this is; fixed by the recipe's file"""

    default_samples: ClassVar[tuple[str, ...]] = (
        "a {trigger} {subject}",
        "a {trigger} {subject} in the snow",
        "a {trigger} {subject} on the beach",
        "a {subject}",
    )
    data_group: ClassVar[type[DataSettings]] = SubjectData

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_concepts(cls, values: Any) -> Any:
        """Where all concepts say what they are, the recipe need not."""
        concepts = values.get("concepts")
        concepts = concepts if isinstance(concepts, list) else []
        named = [one.get("subject") for one in concepts if isinstance(one, dict)]
        return {"subject": named[0], **values} if named and all(named) else values


class StyleData(DataSettings):
    """Captioned pictures of one style."""

    prompt: str = "a picture, {trigger} style"
    """Prompt of a picture that has no caption"""
    caption: str = "{caption}, {trigger} style"
    """How a picture's caption becomes its prompt"""
    prior: Prior = Field(default_factory=lambda: Prior(weight=1.0, images=64))
    """Prior preservation, its pictures drawn from the captions alone: without the trigger, the style stays away"""

    def class_prompts(self, captions: Sequence[str | None]) -> list[str]:
        return list(dict.fromkeys(self.class_text(caption) for caption in captions))

    def class_text(self, caption: str | None) -> str:
        """A caption without the trigger, which class images must not know, and without the commas it leaves behind."""
        without = without_word(caption or "", self.trigger, "( style)?")
        kept = ", ".join(part for part in (" ".join(words.split()) for words in without.split(",")) if part)
        return kept or "a picture"


class StyleRecipe(StyleData, Recipe):
    """A style from captioned pictures."""

    task: Literal["style"] = "style"
    """What kind of training this is; fixed by the recipe's file"""

    default_samples: ClassVar[tuple[str, ...]] = (
        "a dog on the grass, {trigger} style",
        "a house in the snow, {trigger} style",
        "a teapot in the kitchen, {trigger} style",
        "a teapot in the kitchen",
    )
    data_group: ClassVar[type[DataSettings]] = StyleData


class ConceptData(DataSettings):
    """Pictures of what a new word stands for."""

    trigger: str = "<concept>"
    """The new word; one that the base does not know"""
    subject: str = ""
    """The noun that comes near; the word starts with its vectors"""
    prompt: str = "a {trigger}"
    """Prompt of a picture without a caption, where templates=none"""
    templates: Literal["none", "object", "style"] = "object"
    """Show each picture without a caption under many prompts in turn: those for objects, or those for styles"""


class ConceptRecipe(ConceptData, Recipe):
    """A new word for an object or a style, by textual inversion or pivotal tuning."""

    task: Literal["concept"] = "concept"
    """What kind of training this is; fixed by the recipe's file"""
    method: str = "textual-inversion"
    """How the adapter is parametrised; `textual-inversion`, or `pivotal` where weights learn as well"""
    lr: float = Field(5e-3, gt=0)
    """Peak learning rate"""

    default_samples: ClassVar[tuple[str, ...]] = (
        "a {trigger}",
        "a {trigger} in the snow",
        "a {trigger} on the beach",
        "a {subject}",
    )
    data_group: ClassVar[type[DataSettings]] = ConceptData


TASKS: dict[str, type[Recipe]] = {"subject": SubjectRecipe, "style": StyleRecipe, "concept": ConceptRecipe}
