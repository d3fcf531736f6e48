"""Recipes: what to train and how, as data; a file states only the keys that differ from the defaults here.

Users write a recipe flat. Inside, it has groups: `recipe.model`, `recipe.adapter`, `recipe.data`,
`recipe.optim`, `recipe.objective`, `recipe.runtime` and `recipe.outputs`, each immutable; functions take the groups
that they need.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from diffgraft.data.captions import without_word
from diffgraft.data.settings import Conditions
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
    *("images", "layout", "outside", "base", "components", "init_from", "output", "cache"),
    *("checkpoint_every", "sample_every", "sample_prompts", "adapter_every", "watch_every"),
    *("trackers", "format", "previews", "block_swap"),
)
"""Keys that do not affect training steps, or whose files enter the fingerprint through hashes"""


# pydantic takes the keys of the last class first
class Recipe(
    OutputSettings, RuntimeSettings, ObjectiveSettings, OptimSettings, DataSettings, AdapterSettings, ModelSettings
):
    """Recipe keys that every recipe has."""

    task: str
    """Task of the recipe: subject, style, concept or control; fixed by its file"""
    concepts: list[Concept] = Field(default_factory=list)
    """Several concepts learned at once, each with its own images and words; used instead of `images`"""

    default_samples: ClassVar[tuple[str, ...]] = ()
    data_group: ClassVar[type[DataSettings]] = DataSettings
    """Group of images and prompts, with the keys of the task"""

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
        """Return all groups of the recipe."""
        return [self.model, self.adapter, self.data, self.optim, self.objective, self.runtime, self.outputs]

    def _group(self, kind: type[G]) -> G:
        values = {name: getattr(self, name) for name in kind.model_fields}
        return kind.model_construct(_fields_set=self.model_fields_set & values.keys(), **values)

    def samples(self) -> list[str]:
        """Return the prompts of the samples, filled in; those of the task are filled in for each concept."""
        if self.sample_prompts or not self.concepts:
            return [self.fill(prompt) for prompt in self.sample_prompts or self.default_samples]
        few = (*self.default_samples[:2], *self.default_samples[-1:])
        return list(dict.fromkeys(part.fill(prompt) for prompt in few for part in self.parts()))

    def parts(self) -> list[DataSettings]:
        """Return images and prompts of each concept: those of the recipe, overridden by the keys of the concept."""
        overrides = ({key: getattr(concept, key) for key in concept.model_fields_set} for concept in self.concepts)
        return [self.data.model_copy(update=keys) for keys in overrides] or [self.data]

    def folders(self) -> list[str]:
        """Return all image folders of the recipe: training images, held-out images and class images."""
        parts = self.parts()
        priors = [prior for part in (self, *parts) if (prior := getattr(part, "prior", None)) is not None]
        named = (
            self.images,
            *(part.images for part in parts),
            self.validation.images,
            *(prior.folder for prior in priors),
            *(part.conditions.images for part in parts if part.conditions is not None),
        )
        return [folder for folder in dict.fromkeys(named) if folder]

    def fingerprint(self) -> dict[str, Any]:
        """Return the keys that affect training steps; a resumed run must have the same, unless changes are allowed."""
        paths: dict[str, Any] = dict.fromkeys(FREE, True)
        if self.lr_schedule == "constant":  # the learning rate does not depend on the number of steps
            paths["steps"] = True
        paths |= {"concepts": {"__all__": {"images"}}, "validation": {"images", "every", "pairs", "patience"}}
        paths |= {"under": {"adapter"}, "control": {"images"}}
        options = {f"options.{name}": value for name, value in self.options.items() if isinstance(value, dict)}
        orders = {name: [*keys] for name, keys in {"lr_scale": self.lr_scale, **options}.items() if len(keys) > 1}
        return {
            **self.model_dump(mode="json", exclude=paths),
            "order": orders,
        }  # the last of several matching patterns counts

    def header(self) -> dict[str, Any]:
        """Return the keys for the header of the adapter file, without times and paths: equal runs give equal files."""
        paths: dict[str, Any] = dict.fromkeys(
            (
                *("images", "output", "base", "components", "init_from", "cache", "trackers", "format", "previews"),
                *("watch_every", "block_swap"),
            ),
            True,
        )
        paths |= {"concepts": {"__all__": {"images"}}, "validation": {"images"}, "prior": {"folder"}}
        paths |= {"under": {"adapter"}, "control": {"images"}}
        keys = self.model_dump(mode="json", exclude=paths, exclude_defaults=True)
        return {"task": self.task, **keys}

    def with_absolute_paths(self, folder: Path) -> "Recipe":
        """Return the recipe of a run in `folder`, with absolute paths, so that it can be loaded from anywhere."""

        def absolute_paths(group: Any) -> Any:
            update: dict[str, Any] = {"images": absolute_path(group.images)} if group.images else {}
            prior = getattr(group, "prior", None)
            if prior is not None and prior.folder:
                update["prior"] = prior.model_copy(update={"folder": absolute_path(prior.folder)})
            conditions = getattr(group, "control", None)
            if conditions is not None and conditions.images:
                update["control"] = conditions.model_copy(update={"images": absolute_path(conditions.images)})
            return update

        return self.model_copy(
            update={
                **absolute_paths(self),
                "init_from": absolute_path(self.init_from),
                "under": self.under.model_copy(update={"adapter": absolute_path(self.under.adapter)}),
                "output": str(folder),
                "base": self.base if self.base == "tiny" else absolute_path(self.base),
                "components": absolute_path(self.components),
                "concepts": [concept.model_copy(update=absolute_paths(concept)) for concept in self.concepts],
                "validation": self.validation.model_copy(update=absolute_paths(self.validation)),
            }
        )


def absolute_path(path: str) -> str:
    """Return the absolute path of an existing folder or file; other text, such as a hub id, is returned as it is."""
    if not path:
        return ""
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path


class SubjectData(DataSettings):
    """Images of one subject."""

    subject: str = Field(..., min_length=1)
    """Class noun of the subject: dog, backpack, teapot"""
    prompt: str = "a {trigger} {subject}"
    """Prompt of instance images without a caption"""
    class_prompt: str = "a {subject}"
    """Prompt of the class images"""
    prior: Prior = Field(default_factory=lambda: Prior(weight=1.0, images=64))
    """Prior preservation"""

    def class_text(self, caption: str | None) -> str:  # noqa: ARG002
        return self.fill(self.class_prompt)


class SubjectRecipe(SubjectData, Recipe):
    """DreamBooth: a subject from a few images of it."""

    task: Literal["subject"] = "subject"
    """Task of the recipe: subject, style, concept or control; fixed by its file"""

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
        """Take the class noun of the first concept where all concepts have one and the recipe has none."""
        concepts = values.get("concepts")
        concepts = concepts if isinstance(concepts, list) else []
        named = [concept.get("subject") for concept in concepts if isinstance(concept, dict)]
        return {"subject": named[0], **values} if named and all(named) else values


class StyleData(DataSettings):
    """Captioned images of one style."""

    prompt: str = "a picture, {trigger} style"
    """Prompt of images without a caption"""
    caption: str = "{caption}, {trigger} style"
    """Prompt of an image with a caption; {caption} and {trigger} are filled in"""
    prior: Prior = Field(default_factory=lambda: Prior(weight=1.0, images=64))
    """Prior preservation; class prompts are the captions without the trigger, so that the style stays away without
    it"""

    def class_text(self, caption: str | None) -> str:
        """Return the caption without the trigger, which class images must not contain, and without leftover commas."""
        without = without_word(caption or "", self.trigger, "( style)?")
        kept = ", ".join(part for part in (" ".join(words.split()) for words in without.split(",")) if part)
        return kept or "a picture"


class StyleRecipe(StyleData, Recipe):
    """A style from captioned images."""

    task: Literal["style"] = "style"
    """Task of the recipe: subject, style, concept or control; fixed by its file"""

    default_samples: ClassVar[tuple[str, ...]] = (
        "a dog on the grass, {trigger} style",
        "a house in the snow, {trigger} style",
        "a teapot in the kitchen, {trigger} style",
        "a teapot in the kitchen",
    )
    data_group: ClassVar[type[DataSettings]] = StyleData


class ConceptData(DataSettings):
    """Images of the meaning of a new word."""

    trigger: str = "<concept>"
    """New word, unknown to the base"""
    subject: str = ""
    """Noun with a similar meaning; the vectors of the new word start from its embedding"""
    prompt: str = "a {trigger}"
    """Prompt of images without a caption, where templates=none"""
    templates: Literal["none", "object", "style"] = "object"
    """Show each image without a caption under many prompts in turn: templates for objects, or for styles"""


class ConceptRecipe(ConceptData, Recipe):
    """A new word for an object or a style, by textual inversion or pivotal tuning."""

    task: Literal["concept"] = "concept"
    """Task of the recipe: subject, style, concept or control; fixed by its file"""
    method: str = "textual-inversion"
    """Method: `textual-inversion` trains the word alone, `pivotal` weights as well"""
    lr: float = Field(5e-3, gt=0)
    """Peak learning rate"""

    default_samples: ClassVar[tuple[str, ...]] = (
        "a {trigger}",
        "a {trigger} in the snow",
        "a {trigger} on the beach",
        "a {subject}",
    )
    data_group: ClassVar[type[DataSettings]] = ConceptData


class ControlData(DataSettings):
    """Images with condition pictures."""

    control: Conditions = Field(default_factory=lambda: Conditions.model_validate({}))
    """Condition pictures: edges of the images, or files of your own"""
    trigger: str = ""
    """Word that calls what was learned; a control network needs none"""
    prompt: str = "a picture"
    """Prompt of images without a caption"""


class ControlRecipe(ControlData, Recipe):
    """A network that steers drawing by condition pictures."""

    task: Literal["control"] = "control"
    """Task of the recipe: subject, style, concept or control; fixed by its file"""
    method: str = "controlnet"
    """Method; `controlnet` trains a network beside the denoiser"""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate"""

    data_group: ClassVar[type[DataSettings]] = ControlData


TASKS: dict[str, type[Recipe]] = {
    "subject": SubjectRecipe,
    "style": StyleRecipe,
    "concept": ConceptRecipe,
    "control": ControlRecipe,
}
