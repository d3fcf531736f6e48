"""What a run learns from: the recipe's pictures, what is said of them, how they are cut, and the class images."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffgraft.bases import Base
from diffgraft.data.class_images import class_images
from diffgraft.data.frames import Frame, frames, mirrored
from diffgraft.data.latents import encode_kept
from diffgraft.data.pictures import Picture, UnreadablePictureError
from diffgraft.data.wording import Wording, is_fixed
from diffgraft.errors import DiffgraftError
from diffgraft.generation.generate import Settings
from diffgraft.rng import generator
from diffgraft.trainers.recipe.files import meaningless
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.recipe.settings import Prior
from diffgraft.trainers.training_data.concepts import Read, read_part
from diffgraft.trainers.training_data.holdout import read_held_out, rows_held_out
from diffgraft.trainers.training_data.prompts import captions_of, check_prompts, wording_of
from diffgraft.trainers.training_data.samples import Example, Examples

_BLACK = 4
"""Of 255; less than that is black that was compressed"""


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


@dataclass(frozen=True)
class Materials:
    """All that a run learns from."""

    learnt: Examples
    prior: Examples | None
    """Class images, where prior preservation is by pictures"""
    prior_weight: float
    """λ, where it is by what the bare base says"""
    held_out: Examples | None
    """Pictures that are never learnt from"""
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
    digest = data_digest(ours, prior)
    return Materials(ours, prior, weight_by_prediction(read), aside, all_prompts(plan, ours, prior, aside), digest)


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
            wording, of_class = wording_of(part, picture)
            at_random = plan.crop == "random"
            seed = int(picture.content[:8], 16) if at_random else 0
            own = frames(picture.size, side, plan.buckets, step, plan.crops, at_random, seed)
            items.append(Item(part, picture, wording, of_class, mirrored(own) if plan.flip else own))
    check_prompts(plan, [(one.part, one.picture, one.wording) for one in items], tokenizer)
    if plan.masks.use:
        _check_masks(plan, items)
    return items


def _check_masks(plan: Recipe, items: Sequence[Item]) -> None:
    """Raises DiffgraftError where a mask leaves nothing of a picture to be learnt."""
    if plan.masks.outside:
        return
    for one in items:
        if (mask := _mask_of(one.picture)) is not None and all(_is_black(frame.show(mask)) for frame in one.frames):
            of_file = f"The mask {one.picture.mask_file.name}" if one.picture.mask_file else "The transparency"
            raise DiffgraftError(
                f"{of_file} leaves nothing of {one.picture.name} to be learnt: it is black wherever the picture is "
                "shown. Paint what counts white, remove it, or set masks.outside above 0."
            )


def _mask_of(picture: Picture) -> Image.Image | None:
    """Its mask, where it has one; a damaged picture is left out later, and its own transparency is not looked at."""
    try:
        return picture.mask() if picture.has_mask else None
    except UnreadablePictureError:
        if picture.mask_file is not None:
            raise
        return None


def _is_black(mask: Image.Image) -> bool:
    """Whether a mask in mode L is black all over, but for what JPEG makes of black."""
    return mask.point([0] * (_BLACK + 1) + [255] * (255 - _BLACK)).getbbox() is None


def split(plan: Recipe, items: Sequence[Item], base: Base) -> tuple[list[Item], list[Item]]:
    """What is learnt from, and what is held out: a folder of its own, or a share of each concept's pictures."""
    held = plan.validation
    concepts = {id(one.part): one.part for one in items}
    if held.images:
        read = read_held_out(plan, list(concepts.values()))
        return list(items), collect(plan, read, base.tokenizer, side_of(plan, base), step_of(base))
    if not held.share:
        return list(items), []
    numbers = [[*concepts].index(id(one.part)) for one in items]
    rows = rows_held_out(plan, numbers, [one.picture.content for one in items])
    return [one for row, one in enumerate(items) if row not in rows], [items[row] for row in sorted(rows)]


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
    return Examples(encoded, examples, plan.tags, plan.caption_dropout, plan.masks)


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
        kept = own_class(weighted, prior) if prior.folder else _drawn_class(weighted, prior, base, own)
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


def weight_by_prediction(read: Read) -> float:
    """λ of prior preservation by what the bare base says; 0 where there is none such.

    Raises:
        DiffgraftError: concepts have their classes preserved in different ways.
    """
    priors = [prior for part, _ in read if (prior := prior_of(part)) is not None]
    weights = {one.weight for one in priors if one.by == "prediction"}
    if weights and (len(weights) > 1 or any(one.by == "pictures" for one in priors)):
        raise DiffgraftError(
            "Prior preservation is by prediction for some concepts and otherwise for others: give all of them the same "
            "prior.by and, by prediction, the same prior.weight."
        )
    return max(weights, default=0.0)


def own_class(part: Recipe, prior: Prior) -> Iterator[tuple[int, str, Picture]]:
    """Class images that a person has: repeats, prompt and picture; of kohya's folders as they say.

    Raises:
        DiffgraftError: there is no such folder, or no picture in it.
    """
    captions = part.captions.model_copy(update={"use": True})
    own = {"images": prior.folder, "layout": "auto", "repeats": 1, "captions": captions}
    own |= {"prompt": part.class_text(None), "trigger": ""}
    for found, pictures in read_part(part.model_copy(update=own)):
        for picture in pictures:
            yield found.repeats, next(iter(captions_of(found, picture)), found.prompt), picture


def _drawn_class(part: Recipe, prior: Prior, base: Base, items: Sequence[Item]) -> Iterable[tuple[int, str, Picture]]:
    """Class images that the base draws."""
    captions: list[str | None] = []
    for one in items:
        captions += captions_of(one.part, one.picture) or (None,)
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
