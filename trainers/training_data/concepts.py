"""Concepts of a run: what it learns, each with its images and trigger, from recipe and folder names."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from diffgraft.adapters.registry import get_method
from diffgraft.data.captions import mentions, without_word
from diffgraft.data.image_folder import read_source
from diffgraft.data.inventory import detect_layout
from diffgraft.data.pictures import Picture
from diffgraft.data.tables import check_inside
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.objectives.registry import objectives
from diffgraft.trainers.recipe.files import unsupported_keys
from diffgraft.trainers.recipe.groups import AdapterSettings, DataSettings
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.recipe.settings import Concept
from diffgraft.trainers.training_data.pairs import partner_folders, with_partners

ConceptImages = list[tuple[DataSettings, list[Picture]]]
"""For each concept its settings and its images; none where the base is to draw them"""
_FILLER_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "my",
        "photo",
        "photos",
        "picture",
        "pictures",
        "image",
        "portrait",
        "painting",
        "drawing",
        "of",
        "in",
        "style",
    ]
)
"""Words in a folder's name that are not part of a trigger"""
_MAX_TRIGGER_WORDS = 3
"""Number of words up to which a folder's name is a trigger; longer ones are a sentence"""


def read_concepts(recipe: Recipe) -> tuple[Recipe, ConceptImages]:
    """Read the images of all concepts; return the recipe with its final triggers and concepts, and the images.

    If the recipe sets no trigger, it is taken from the names of numbered folders, such as `ohwx` from `10_ohwx man`;
    folders with different triggers become concepts.

    Raises:
        DiffgraftError: a folder or data set is missing, ambiguous or without images; or there are several triggers, but
            the method trains a single token; or the objective needs pairs, and an image has no partner.
    """
    used = [Path(path) for path in (recipe.output, *recipe.folders()) if path]
    parts, objective = recipe.parts(), objectives().get(recipe.loss.objective)
    if objective is not None and not objective.uses_prior:
        parts = [part.model_copy(update={"prior": None}) for part in parts]
    pairs = None if objective is None else objective.pairs
    used += [] if pairs is None else partner_folders(recipe.folders(), pairs)
    concept_images = _read_all(parts, recipe.adapter, recipe.trigger, used)
    if pairs is not None:
        concept_images = [(settings, with_partners(settings, pictures, pairs)) for settings, pictures in concept_images]
    triggers = list(dict.fromkeys(settings.trigger for settings, _ in concept_images))
    if recipe.concepts or triggers == [recipe.trigger]:
        return recipe, concept_images
    if len(triggers) == 1:
        return recipe.model_copy(update={"trigger": triggers[0]}), concept_images
    concepts = [
        Concept(
            images=settings.images,
            trigger=settings.trigger,
            prompt=settings.prompt,
            repeats=settings.repeats,
            weight=settings.weight,
        )
        for settings, _ in concept_images
    ]
    changes = {"trigger": triggers[0], "images": "", "repeats": 1, "concepts": concepts}
    return recipe.model_copy(update=changes), concept_images


def _read_all(
    concepts: Sequence[DataSettings], adapter: AdapterSettings, trigger: str, used: Collection[Path]
) -> ConceptImages:
    """Settings and images of each concept; numbered folders are separate ones.

    Raises:
        DiffgraftError: as in `read_concepts`.
    """
    method = get_method(adapter.method)
    lacks_prior = "prior" in unsupported_keys(adapter)
    concept_images: ConceptImages = []
    for concept in concepts:
        # a method that trains a token uses the recipe's trigger, whatever the names of folders
        fixed = {"trigger": concept.trigger} if method.learns_token else {}
        without = {"prior": None} if lacks_prior and hasattr(concept, "prior") else {}
        concept_images += read_concept(concept.model_copy(update=fixed | without), used)
    others = sorted({concept.trigger for concept, _ in concept_images} - {trigger})
    if others and method.learns_token:
        raise DiffgraftError(
            f"method={adapter.method} trains a single token, {trigger!r}, but concepts have other triggers: "
            f"{', '.join(others)}. Give all of them the recipe's trigger, or use method=lora."
        )
    return concept_images


def read_concept(
    concept: DataSettings, used: Collection[Path] = (), *, has_setting: bool = True
) -> Iterator[tuple[DataSettings, list[Picture]]]:
    """Yield settings and images of one concept, or of each of its numbered folders.

    Files that are not read cause warnings.

    Args:
        concept: the concept's settings.
        used: folders that the run uses otherwise, for which there are no such warnings.
        has_setting: whether the recipe's key `layout` applies to the folder, as it does to `images`.
    """
    if not concept.images:  # the base is to draw them
        yield concept, []
        return
    root = Path(concept.images).expanduser()
    layout = detect_layout(root, concept.layout, used, has_setting=has_setting)
    for remark in layout.remarks:
        warnings.warn(remark, stacklevel=5)
    for numbered in layout.folders:
        folder = str(numbered.folder)
        if not concept.outside:
            check_inside(root, numbered.folder, folder)
        repeats = numbered.repeats * concept.repeats
        changes = {"images": folder, "repeats": repeats, "prompt": numbered.prompt, "layout": "flat"}
        # a copy keeps the set of keys that the recipe sets, which tells whether it sets the trigger
        settings = concept.model_copy(update=changes)
        pictures = _read_pictures(settings, used)
        yield settings.model_copy(update={"trigger": _trigger(settings, numbered.prompt, pictures)}), pictures
    if not layout.folders:
        yield concept, _read_pictures(concept, used)


def _read_pictures(concept: DataSettings, used: Collection[Path]) -> list[Picture]:
    return read_source(concept.images, concept.caption_column, thorough=False, outside=concept.outside, used=used)


def _trigger(concept: DataSettings, folder_prompt: str, pictures: Sequence[Picture]) -> str:
    """Trigger of a numbered folder: the recipe's, or the one in the folder's name if captions contain that one."""
    if "trigger" in concept.model_fields_set or concept.templates != "none":
        return concept.trigger
    use_captions = concept.captions.use
    texts = [text for picture in pictures for text in ((picture.captions if use_captions else ()) or (folder_prompt,))]
    candidate = _trigger_in(folder_prompt, concept.noun)
    if candidate and not any(mentions(text, concept.trigger) for text in texts):
        # captions may lack it if the recipe inserts it and the folder names the class: "ohwx man" with subject=man
        is_named = concept.insert_trigger and concept.noun and mentions(folder_prompt, concept.noun)
        return candidate if is_named or any(mentions(text, candidate) for text in texts) else concept.trigger
    return concept.trigger


def _trigger_in(folder_prompt: str, noun: str) -> str:
    """The trigger in a folder's prompt: `ohwx` in `ohwx man` with the class noun `man`; empty if there is none."""
    rest = without_word(folder_prompt, noun) if noun else folder_prompt
    words = [word for word in rest.split() if word.lower() not in _FILLER_WORDS and not word.startswith("{")]
    if noun and rest == folder_prompt:  # another noun: the last word, by kohya's convention
        words = words[:-1] or words
    return " ".join(words) if len(words) <= _MAX_TRIGGER_WORDS else ""
