"""The target of an evaluation: what adapters were to learn, from the recipe of their run, their header, or options."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from PIL import Image

from diffgraft.bases import Base
from diffgraft.bases.loading import LoadOptions
from diffgraft.data.image_folder import read_source
from diffgraft.data.pictures import Picture
from diffgraft.errors import DiffgraftError, did_you_mean, short_repr
from diffgraft.evaluation.candidates import run_folder_or_none
from diffgraft.evaluation.evidence import Prompts, Reference
from diffgraft.evaluation.prompts import Words, read_prompts
from diffgraft.trainers.recipe.groups import DataSettings
from diffgraft.trainers.recipe.settings import UnderSettings
from diffgraft.trainers.run.folder import read_prompts as read_prompt_file
from diffgraft.trainers.run.folder import recipe_with
from diffgraft.trainers.training_data.concepts import read_concepts
from diffgraft.trainers.training_data.holdout import read_held_out
from diffgraft.trainers.training_data.prompts import prompt_builders

_MOST_REFERENCES = 64
"""References that are compared with; of more pictures, these are taken evenly"""
_SUBJECT = ("a {trigger} {subject}", "a {trigger} {subject} in the snow", "a {trigger} {subject} on the beach")
_STYLE = ("a dog on the grass, {trigger} style", "a house in the snow, {trigger} style")


@dataclass(frozen=True)
class HeldOutPicture:
    """A picture that was not trained on, and the prompt for it."""

    image: Image.Image
    prompt: str
    mask: Image.Image | None = None


@dataclass(frozen=True, eq=False)
class Target:
    """What the evaluated adapters were trained to learn: words, prompts and reference pictures."""

    base: str
    """Name or path of the base"""
    load_options: LoadOptions
    words: Words
    prompts: Prompts
    references: Sequence[Reference]
    held_out: Sequence[HeldOutPicture] = ()
    under: UnderSettings | None = None
    """Adapter under the training that belongs under the pictures too; None without one"""

    @property
    def is_subject(self) -> bool:
        """Whether a subject was learned, not a style."""
        return bool(self.words.noun)


def target_of(source: str | Path, metadata: Mapping[str, Any], options: Mapping[str, Any]) -> Target:
    """Return the target of a run, or of an adapter file.

    Args:
        source: the run's folder, or the file.
        metadata: metadata of the adapter, which tell trigger, class and base of files.
        options: those of `diffgraft.evaluation.evaluate.EvaluationOptions`, which override what is known.

    Raises:
        DiffgraftError: trigger, base, prompts or pictures are unknown or cannot be read; or the run has learned neither
            a subject nor a style.
    """
    folder = run_folder_or_none(source)
    if folder is None:
        return _of_file(metadata, options)
    recipe = recipe_with(folder / "recipe.yaml", {})
    if recipe.data.conditions is not None:
        raise DiffgraftError(
            f"The run in {folder} trained a control network, which learns no subject "
            "and no style: judge it by the pictures of generate --control instead."
        )
    images = options.get("images")
    if images is not None:
        recipe = recipe.model_copy(update={"images": fspath(images), "concepts": []})
    recipe, read = read_concepts(recipe)
    if not any(pictures for _, pictures in read):
        raise DiffgraftError(
            f"The run in {folder} has no pictures to compare with: give a folder of what it was to learn (--images)."
        )
    settings, pictures = _concept(read, str(options.get("trigger") or ""))
    words = Words(str(options.get("trigger") or settings.trigger), str(options.get("subject") or settings.noun))
    model = recipe.model
    return Target(
        _base_name(options) or model.base,
        model.load_options(),
        words,
        read_prompts(words, _listed(options) or _samples(recipe.sample_prompts or recipe.default_samples, settings)),
        _references(pictures),
        _held_out(options.get("held_out") or recipe.validation.images, settings),
        recipe.under if recipe.under.adapter and recipe.under.when == "always" else None,
    )


def _of_file(metadata: Mapping[str, Any], options: Mapping[str, Any]) -> Target:
    """Return the target of an adapter file, from its header and the options."""
    words = Words(
        str(options.get("trigger") or metadata.get("trigger") or ""),
        str(options.get("subject") or metadata.get("class") or ""),
    )
    if not words.trigger:
        raise DiffgraftError("The file does not tell the trigger of the adapter: give it (--trigger sks).")
    told = metadata.get("base")
    base = _base_name(options) or (str(told.get("name", "")) if isinstance(told, Mapping) else "")
    if not base or (base != "tiny" and not options.get("base") and not Path(base).exists()):
        named = f" ({base})" if base else ""
        raise DiffgraftError(f"The base of the adapter is not known by path{named}: give it (--base).")
    images = options.get("images")
    if images is None:
        raise DiffgraftError(
            "A file does not hold the pictures that it was trained on: give a folder with pictures of what it was to "
            "learn (--images)."
        )
    pictures = read_source(fspath(images))
    prompts = read_prompts(words, _listed(options) or (_SUBJECT if words.noun else _STYLE))
    held_out = options.get("held_out")
    kept = read_source(fspath(held_out)) if held_out else []
    plain = f"a {words.trigger} {words.noun}".strip() if words.noun else f"a picture, {words.trigger} style"
    shown = [HeldOutPicture(picture.image, picture.caption or plain, picture.mask()) for picture in kept]
    return Target(base, {}, words, prompts, _references(pictures), shown)


def _base_name(options: Mapping[str, Any]) -> str:
    """Return the name of the base in the options; empty without one."""
    base = options.get("base") or ""
    return base.name if isinstance(base, Base) else str(base)


def _concept(read: Sequence[tuple[DataSettings, list[Picture]]], trigger: str) -> tuple[DataSettings, list[Picture]]:
    """Return the concept of a trigger, by default the first one."""
    by_trigger = {settings.trigger: (settings, pictures) for settings, pictures in read if pictures}
    if len(by_trigger) > 1 and not trigger:
        others = ", ".join(list(by_trigger)[1:])
        warnings.warn(
            f"The run has {len(by_trigger)} concepts, of which {next(iter(by_trigger))} is evaluated; for others give "
            f"their trigger (--trigger): {others}.",
            stacklevel=4,
        )
    if trigger and trigger not in by_trigger and len(by_trigger) > 1:
        raise DiffgraftError(f"No concept of the run has the trigger {trigger!r}: {did_you_mean(trigger, by_trigger)}")
    return by_trigger.get(trigger) or next(iter(by_trigger.values()))


def _samples(prompts: Sequence[str], settings: DataSettings) -> list[str]:
    """Return the prompts of samples, filled in for a concept, after a neutral one."""
    listed = [settings.fill(prompt) for prompt in prompts]
    neutral = settings.fill(settings.prompt)
    return [neutral, *listed] if settings.templates == "none" else listed


def _listed(options: Mapping[str, Any]) -> list[str]:
    """Return the prompts in the options: the lines of a file, or a list; empty without any."""
    given = options.get("prompts")
    if given is None:
        return []
    if isinstance(given, str | PathLike):
        path = Path(given)
        if path.suffix != ".txt":
            raise DiffgraftError(
                f"Invalid prompts {short_repr(str(given))}: must be a .txt file with one on each line."
            )
        return read_prompt_file([str(path)])
    return [str(prompt) for prompt in given]


def _references(pictures: Sequence[Picture]) -> list[Reference]:
    """Return pictures as references, at most 64 of them, with masks from files or alpha channels."""
    step = max(1.0, len(pictures) / _MOST_REFERENCES)
    few = [pictures[int(place * step)] for place in range(min(len(pictures), _MOST_REFERENCES))]
    return [Reference(picture.image, picture.mask() if picture.has_mask else None) for picture in few]


def _held_out(folder: str | PathLike[str] | None, settings: DataSettings) -> list[HeldOutPicture]:
    """Return the held-out pictures of a concept, with the prompts that validation has for them."""
    if not folder:
        return []
    ((_, pictures),) = read_held_out(fspath(folder), [settings])
    return [
        HeldOutPicture(picture.image, prompt_builders(settings, picture)[0].prompts()[0], picture.mask())
        for picture in pictures
    ]
