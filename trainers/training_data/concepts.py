"""The things that a run learns: each with its pictures and the word that calls it, as recipe and folders tell."""

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
from diffgraft.trainers.recipe.files import unsupported_keys
from diffgraft.trainers.recipe.groups import AdapterSettings, DataSettings
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.recipe.settings import Concept

ConceptImages = list[tuple[DataSettings, list[Picture]]]
"""Pictures and prompts of each concept, and its pictures"""
_FILLING = frozenset(
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
"""Words that a folder's name has around the one that calls what is in it"""
_LONGEST_NAME = 3
"""Words; more of them are a sentence"""


def read_concepts(recipe: Recipe) -> tuple[Recipe, ConceptImages]:
    """The recipe with the triggers that it comes to, and each concept's settings with its pictures.

    Where the recipe does not say the trigger, and pictures are called otherwise by their folder (`10_ohwx man`), that
    word is the trigger; folders that are called differently are concepts of their own.

    Raises:
        DiffgraftError: a folder or data set is not there, can be read in two ways, or holds no pictures; or the method
            cannot teach so many words.
    """
    used = [Path(one) for one in (recipe.output, *recipe.folders()) if one]
    read = _read_all(recipe.parts(), recipe.adapter, recipe.trigger, used)
    triggers = list(dict.fromkeys(part.trigger for part, _ in read))
    if recipe.concepts or triggers == [recipe.trigger]:
        return recipe, read
    if len(triggers) == 1:
        return recipe.model_copy(update={"trigger": triggers[0]}), read
    concepts = [
        Concept(images=part.images, trigger=part.trigger, prompt=part.prompt, repeats=part.repeats, weight=part.weight)
        for part, _ in read
    ]
    return recipe.model_copy(update={"trigger": triggers[0], "images": "", "repeats": 1, "concepts": concepts}), read


def _read_all(
    parts: Sequence[DataSettings], adapter: AdapterSettings, trigger: str, used: Collection[Path]
) -> ConceptImages:
    """Pictures and prompts of each concept.

    Raises:
        DiffgraftError: as `read_concepts`.
    """
    method = get_method(adapter.method)
    lacks_prior = "prior" in unsupported_keys(adapter)
    read: ConceptImages = []
    for part in parts:
        # a word that a method teaches is the recipe's, whatever folders say
        fixed = {"trigger": part.trigger} if method.learns_token else {}
        without = {"prior": None} if lacks_prior and hasattr(part, "prior") else {}
        read += read_part(part.model_copy(update=fixed | without), used)
    others = sorted({part.trigger for part, _ in read} - {trigger})
    if others and method.learns_token:
        raise DiffgraftError(
            f"{adapter.method} teaches one word, {trigger!r}, and concepts are called {', '.join(others)}: give "
            "all of them the recipe's trigger, or take method=lora."
        )
    return read


def read_part(
    part: DataSettings, used: Collection[Path] = (), *, has_setting: bool = True
) -> Iterator[tuple[DataSettings, list[Picture]]]:
    """The pictures of one concept, those of each numbered folder apart, where they are laid out so.

    Warnings name what is there and not read, but for what is in folders `used` otherwise. Of folders that are
    not the recipe's `images`, no setting says how they are laid out.
    """
    root = Path(part.images).expanduser()
    layout = detect_layout(root, part.layout, used, has_setting=has_setting)
    for said in layout.remarks:
        warnings.warn(said, stacklevel=5)
    for one in layout.folders:
        if not part.outside:
            check_inside(root, one.folder, str(one.folder))
        own = {"images": str(one.folder), "repeats": one.repeats * part.repeats, "prompt": one.prompt, "layout": "flat"}
        # whether the recipe says the trigger is told by what was set in `part`
        named = part.model_copy(update=own)
        pictures = _pictures(named, used)
        yield named.model_copy(update={"trigger": _trigger(named, one.prompt, pictures)}), pictures
    if not layout.folders:
        yield part, _pictures(part, used)


def _pictures(part: DataSettings, used: Collection[Path]) -> list[Picture]:
    return read_source(part.images, part.caption_column, thorough=False, outside=part.outside, used=used)


def _trigger(part: DataSettings, says: str, pictures: Sequence[Picture]) -> str:
    """The word that calls the pictures of a numbered folder: the recipe's, or the one that folder and captions have."""
    if "trigger" in part.model_fields_set or part.templates != "none":
        return part.trigger
    texts = [text for one in pictures for text in ((one.captions if part.captions.use else ()) or (says,))]
    found = _name_in(says, part.noun)
    if found and not any(mentions(text, part.trigger) for text in texts):
        # where captions lack it, but the recipe puts the word there and the folder says which: "ohwx man" of a man
        is_said = part.insert_trigger and part.noun and mentions(says, part.noun)
        return found if is_said or any(mentions(text, found) for text in texts) else part.trigger
    return part.trigger


def _name_in(says: str, noun: str) -> str:
    """Of what a folder says, "ohwx man", the word that is not the class noun; empty where none stands out."""
    rest = without_word(says, noun) if noun else says
    words = [word for word in rest.split() if word.lower() not in _FILLING and not word.startswith("{")]
    if noun and rest == says:  # another noun: by kohya's convention the last word
        words = words[:-1] or words
    return " ".join(words) if len(words) <= _LONGEST_NAME else ""
