"""What a run learns from: the recipe's pictures, what is said of them, how they are cut, and the class images."""

import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffgraft.adapters.method import get_method
from diffgraft.bases import Base
from diffgraft.bases.sd1 import lost_words
from diffgraft.data.class_images import class_images
from diffgraft.data.frames import Frame, frames, mirrored
from diffgraft.data.latents import encode_kept
from diffgraft.data.pictures import Picture
from diffgraft.data.source import counted_folders, read_source
from diffgraft.data.wording import Wording, is_fixed
from diffgraft.errors import DiffgraftError
from diffgraft.generation.generate import Settings
from diffgraft.trainers.denoising import Noising
from diffgraft.trainers.examples import Example, Examples, generator
from diffgraft.trainers.recipe import Recipe, StyleRecipe
from diffgraft.trainers.recipe_files import meaningless
from diffgraft.trainers.settings import Prior
from diffgraft.trainers.templates import TEMPLATES
from diffgraft.trainers.validation import HeldOut, held_out

_NAMED = 3
"""So many pictures are named where more of them have the same fault"""


@dataclass(frozen=True)
class Item:
    """A picture, what is said of it, and how it is shown."""

    part: Recipe
    """The recipe of its concept"""
    picture: Picture
    wording: Wording
    class_wording: Wording
    """The same of its class"""
    frames: list[Frame]


Read = list[tuple[Recipe, list[Picture]]]
"""The recipe of each concept, and its pictures"""


@dataclass(frozen=True)
class Materials:
    """All that a run learns from."""

    learnt: Examples
    prior: Examples | None
    """Class images, where prior preservation is by pictures"""
    prior_weight: float
    """λ, where it is by what the bare base says"""
    held_out: HeldOut | None
    prompts: list[str] | None
    """Every prompt that can come up; None where they are without number"""
    digest: str
    """SHA-256 over all that is learnt from"""


def gather(plan: Recipe, base: Base, read: Read) -> Materials:
    """Encode the pictures that were read, and draw or read class images."""
    items = collect(plan, read, base.tokenizer, side_of(plan, base), step_of(base))
    learnt, held = split(plan, items, base)
    ours = examples_of(plan, base, learnt, "encoding pictures")
    prior = class_examples(plan, base, learnt)
    aside = examples_of(plan, base, held, "encoding held-out pictures") if held else None
    trial = held_out(Noising(base), aside.encoded, aside.examples, plan.validation.pairs) if aside else None
    by_prediction = [prior_of(part) for part, _ in read]
    weights = {one.weight for one in by_prediction if one is not None and one.by == "prediction"}
    if weights and (prior is not None or len(weights) > 1):
        raise DiffgraftError(
            "Prior preservation is by prediction for some concepts and otherwise for others: give all of them the same "
            "prior.by and, by prediction, the same prior.weight."
        )
    digest = data_digest(ours, prior)
    return Materials(ours, prior, max(weights, default=0.0), trial, all_prompts(plan, ours, prior, aside), digest)


def parts_of(plan: Recipe) -> list[Recipe]:
    """The recipe of each concept: of those it names, or of each folder of kohya's layout, where it is laid out so."""
    found: list[Recipe] = []
    for part in plan.parts():
        counted = counted_folders(part.images)
        own = [
            part.model_copy(
                update={"images": str(one.folder), "repeats": one.repeats * part.repeats, "prompt": one.says}
            )
            for one in counted
        ]
        found += own or [part]
    return found


def read_pictures(plan: Recipe) -> Read:
    """The pictures of each concept.

    Raises:
        DiffgraftError: a folder or data set is not there, or holds no pictures; or the method cannot teach so many
            words.
    """
    parts = parts_of(plan)
    others = sorted({part.trigger for part in parts} - {plan.trigger})
    if others and get_method(plan.method).teaches_word:
        raise DiffgraftError(
            f"{plan.method} teaches one word, {plan.trigger!r}, and concepts are called {', '.join(others)}: give all "
            "of them the recipe's trigger, or take method=lora."
        )
    return [(part, read_source(part.images, part.caption_column, thorough=False)) for part in parts]


def side_of(plan: Recipe, base: Base) -> int:
    """Resolution in pixels."""
    return plan.resolution or base.resolution


def collect(plan: Recipe, read: Read, tokenizer: Any, side: int, step: int) -> list[Item]:
    """Every picture with its prompts and frames; what a person may not have meant is said in warnings.

    Raises:
        DiffgraftError: a prompt is too long, and the recipe refuses those.
    """
    items = []
    for part, pictures in read:
        for picture in pictures:
            wording, of_class = _wording(part, picture)
            own = frames(
                picture.size, side, plan.buckets, step, plan.crops, plan.crop == "random", int(picture.content[:8], 16)
            )
            items.append(Item(part, picture, wording, of_class, mirrored(own) if plan.flip else own))
    _check_lengths(plan, items, tokenizer)
    lacking: dict[str, list[str]] = {}
    for one in items:
        if any(one.part.trigger not in text for text in one.wording.prompts()):
            lacking.setdefault(one.part.trigger, []).append(one.picture.name)
    for trigger, names in lacking.items():
        what = f"The caption of {_named(names)} lacks the trigger {trigger!r}."
        warnings.warn(f"{what} insert_trigger=true puts it in front.", stacklevel=4)
    return items


def _wording(part: Recipe, picture: Picture) -> tuple[Wording, Wording]:
    captions = picture.captions if part.captions else ()
    if not captions:
        texts = TEMPLATES[part.templates] if part.templates != "none" else (part.prompt,)
        said = tuple(part.fill(text) for text in texts)
        return Wording(said), Wording((part.class_text(None),) * len(said))
    of_class = Wording(tuple(part.class_text(caption) for caption in captions))
    calls = re.compile(rf"(?<!\w){re.escape(part.trigger)}(?!\w)").search
    around = tuple("{caption}" if calls(caption) else _around(part) for caption in captions)
    return Wording(captions, around), of_class


def _around(part: Recipe) -> str:
    """What a caption that lacks the trigger is put into."""
    if part.insert_trigger:
        return f"{part.trigger}{part.tags.separator} {{caption}}"
    return part.fill(part.caption) if isinstance(part, StyleRecipe) else "{caption}"


def _check_lengths(plan: Recipe, items: Sequence[Item], tokenizer: Any) -> None:
    if plan.long_prompts == "chunk":
        return
    lost: dict[str, str] = {}
    for one in items:
        for prompt in one.wording.prompts():
            if words := lost_words(tokenizer, prompt):
                lost.setdefault(one.picture.name, words)
    if not lost:
        return
    name, words = next(iter(lost.items()))
    what = f"The prompt of {_named(list(lost))} is too long"
    if plan.long_prompts == "refuse":
        raise DiffgraftError(
            f"{what}; of that of {name} the base would never see: {words}. Shorten it, or set long_prompts=chunk."
        )
    warnings.warn(f"{what}; the base never sees: {words}. long_prompts=chunk has it read in pieces.", stacklevel=5)


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def split(plan: Recipe, items: Sequence[Item], base: Base) -> tuple[list[Item], list[Item]]:
    """What is learnt from, and what is held out: a folder of its own, or those whose contents' hashes are the least."""
    held = plan.validation
    if held.images:
        part = plan.model_copy(update={"images": held.images, "concepts": []})
        read = [(part, read_source(held.images, plan.caption_column, thorough=False))]
        return list(items), collect(part, read, base.tokenizer, side_of(plan, base), step_of(base))
    if not held.share:
        return list(items), []
    count = max(1, round(held.share * len(items)))
    if count >= len(items):
        raise DiffgraftError(
            f"validation.share={held.share} of {len(items)} pictures leaves none to learn from: give more pictures, or "
            "a folder of others as validation.images."
        )
    least = sorted(range(len(items)), key=lambda row: items[row].picture.content)[:count]
    return [one for row, one in enumerate(items) if row not in least], [items[row] for row in sorted(least)]


def step_of(base: Base) -> int:
    """What sides of pictures are multiples of."""
    return math.lcm(base.factor, 8)


def examples_of(plan: Recipe, base: Base, items: Sequence[Item], title: str) -> Examples:
    """The items, encoded.

    Raises:
        DiffgraftError: none of them can be opened.
    """
    pictures, ways = [one.picture for one in items], [one.frames for one in items]
    encoded = encode_kept(base, pictures, ways, masked=plan.masks.use, keep=plan.cache, title=title)
    if not encoded.rows:
        raise DiffgraftError(f"None of the {len(items)} pictures can be opened. Save them again as JPEG or PNG.")
    examples = [
        Example(
            one.picture.name,
            encoded.rows[place],
            one.wording,
            one.class_wording,
            one.part.repeats,
            one.part.weight,
            one.picture.content + (one.picture.mask_content if plan.masks.use else ""),
        )
        for place, one in enumerate(items)
        if place in encoded.rows
    ]
    return Examples(encoded, examples, plan.tags, plan.caption_dropout)


def class_examples(plan: Recipe, base: Base, items: Sequence[Item]) -> Examples | None:
    """The class images of all concepts, each with its λ for a weight; None without such prior preservation."""
    found: list[Item] = []
    classes: dict[tuple[str, str, str], list[Item]] = {}
    for one in items:
        if (prior := prior_of(one.part)) is not None and prior.by == "pictures":
            # concepts of one class share its pictures
            key = (prior.model_dump_json(), one.part.class_text(None), one.part.trigger)
            classes.setdefault(key, []).append(one)
    for own in classes.values():
        part = own[0].part
        prior = prior_of(part)
        assert prior is not None
        weighted = part.model_copy(update={"weight": prior.weight})
        kept = _own_class(weighted, prior) if prior.folder else _drawn_class(weighted, prior, base, own)
        for repeats, prompt, picture in kept:
            way = frames(picture.size, side_of(plan, base), plan.buckets, step_of(base))
            said = Wording((prompt,))
            each = weighted.model_copy(update={"repeats": repeats})
            found.append(Item(each, picture, said, said, mirrored(way) if plan.flip else way))
    if not found:
        return None
    bare = plan.model_copy(update={"masks": plan.masks.model_copy(update={"use": False}), "caption_dropout": 0.0})
    return examples_of(bare, base, found, "encoding class images")


def prior_of(part: Recipe) -> Prior | None:
    """Its prior preservation, where there is any."""
    prior: Prior | None = getattr(part, "prior", None)
    return None if prior is None or prior.weight == 0 or "prior" in meaningless(part) else prior


def _own_class(part: Recipe, prior: Prior) -> Iterable[tuple[int, str, Picture]]:
    """Class images that a person has: repeats, prompt and picture; of kohya's folders as they say."""
    for one in counted_folders(prior.folder):
        for picture in read_source(one.folder, part.caption_column, thorough=False):
            yield one.repeats, picture.caption or one.says, picture
    if not counted_folders(prior.folder):
        for picture in read_source(prior.folder, part.caption_column, thorough=False):
            yield 1, picture.caption or part.class_text(None), picture


def _drawn_class(part: Recipe, prior: Prior, base: Base, items: Sequence[Item]) -> Iterable[tuple[int, str, Picture]]:
    """Class images that the base draws."""
    captions: list[str | None] = []
    for one in items:
        captions += (one.picture.captions if part.captions else ()) or (None,)
    texts = part.class_prompts(captions)
    if len(texts) > prior.images:  # each is drawn at least once
        rows = torch.randperm(len(texts), generator=generator(part.seed))[: prior.images]
        texts = [texts[row] for row in sorted(rows.tolist())]
    side = side_of(part, base)
    each = math.ceil(prior.images / len(texts)) if texts else 0
    for prompt, picture in class_images(base, texts, each, Settings(size=(side, side)), part.seed) if texts else ():
        yield 1, prompt, picture


def all_prompts(plan: Recipe, *said: Examples | None) -> list[str] | None:
    """Every prompt that can come up, None where they are without number."""
    if not is_fixed(plan.tags):
        return None
    found = [""] if plan.caption_dropout or plan.long_prompts == "chunk" else []
    for data in said:
        for one in data.examples if data else ():
            found += one.wording.prompts() + one.class_wording.prompts()
    return list(dict.fromkeys(found))


def data_digest(*said: Examples | None) -> str:
    """SHA-256 over what is learnt from, in order: files, cuts, masks, prompts and how much each counts."""
    digest = hashlib.sha256()
    for data in said:
        for one in data.examples if data else ():
            assert data is not None
            shown = [data.encoded.frames[row] for row in one.rows]
            digest.update(
                f"{one.content} {shown} {one.wording} {one.class_wording} {one.repeats} {one.weight}\n".encode()
            )
    return digest.hexdigest()


def local(path: str) -> str:
    """A folder's whole path; what is no folder, such as an id on the hub, as it is."""
    found = Path(path).expanduser()
    return str(found.resolve()) if found.exists() else path
