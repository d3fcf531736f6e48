"""What a run learns from: the recipe's pictures, what is said of them, how they are cut, and the class images."""

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from diffgraft.bases import Base
from diffgraft.data.captions import PromptBuilder, is_fixed
from diffgraft.data.class_images import class_images
from diffgraft.data.frames import Frame, frames, with_mirrored
from diffgraft.data.inventory import named, pluralize
from diffgraft.data.latents import encode_cached
from diffgraft.data.pictures import Picture, UnreadablePictureError
from diffgraft.errors import DiffgraftError
from diffgraft.generation.generate import Settings
from diffgraft.rng import generator
from diffgraft.trainers.recipe.groups import DataSettings
from diffgraft.trainers.recipe.settings import Prior, Validation
from diffgraft.trainers.training_data.concepts import ConceptImages, read_part
from diffgraft.trainers.training_data.examples import Example, Examples
from diffgraft.trainers.training_data.holdout import read_held_out, rows_held_out
from diffgraft.trainers.training_data.prompts import captions_of, check_prompts, wording_of

_LONGEST_ROUND = 5_000_000
_BLACK = 4
"""Of 255; less than that is black that was compressed"""


@dataclass(frozen=True)
class Sample:
    """A picture, what is said of it, and how it is shown."""

    part: DataSettings
    """The settings of its concept"""
    picture: Picture
    wording: PromptBuilder
    class_wording: PromptBuilder
    """The same of its class"""
    frames: list[Frame]


@dataclass(frozen=True)
class TrainingData:
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


def build_training_data(
    data: DataSettings, validation: Validation, seed: int, base: Base, read: ConceptImages
) -> TrainingData:
    """Encode the pictures that were read, and draw or read class images."""
    samples = collect(data, read, base)
    learnt, held = split(data, validation, samples, base)
    ours = examples_of(data, base, learnt, "encoding pictures")
    prior = class_examples(data, seed, base, learnt)
    aside = examples_of(data, base, held, "encoding held-out pictures") if held else None
    digest = data_digest(ours, prior)
    return TrainingData(ours, prior, weight_by_prediction(read), aside, all_prompts(data, ours, prior, aside), digest)


def resolution_of(data: DataSettings, base: Base) -> int:
    """Side in pixels that pictures are cut and scaled to."""
    return data.resolution or base.resolution


def collect(data: DataSettings, read: ConceptImages, base: Base) -> list[Sample]:
    """Every picture with its prompts and frames; what a person may not have meant is said in warnings.

    Raises:
        DiffgraftError: a prompt is too long, and the recipe refuses those; or a round would have too many pictures.
    """
    samples = []
    for part, pictures in read:
        for picture in pictures:
            wording, of_class = wording_of(part, picture)
            own = _frames(data, picture, base)
            samples.append(Sample(part, picture, wording, of_class, with_mirrored(own) if data.flip else own))
    _check_repeats(samples)
    check_prompts(data.long_prompts, [(one.part, one.picture, one.wording) for one in samples], base.tokenizer)
    if data.masks.use and not data.masks.outside:
        _check_masks(samples)
    return samples


def _check_repeats(samples: Sequence[Sample]) -> None:
    """Raises DiffgraftError where repeats make a round of more places than can be kept in mind."""
    if (count := sum(one.part.repeats for one in samples)) > _LONGEST_ROUND:
        raise DiffgraftError(
            f"Repeats make a round of {count:,} pictures, and the most is {_LONGEST_ROUND:,}: take smaller repeats; "
            "their ratio alone decides how often each picture is shown."
        )


def _frames(data: DataSettings, picture: Picture, base: Base) -> list[Frame]:
    """The cuts in which a picture is shown."""
    at_random = data.crop == "random"
    seed = int(picture.content[:8], 16) if at_random else 0
    return frames(
        picture.size, resolution_of(data, base), data.buckets, step_of(base), data.crops, at_random=at_random, seed=seed
    )


def _check_masks(samples: Sequence[Sample]) -> None:
    """Raises DiffgraftError where a mask leaves nothing of a picture to be learnt."""
    for one in samples:
        if (mask := _mask_of(one.picture)) is not None and all(_is_black(frame.crop(mask)) for frame in one.frames):
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


def split(
    data: DataSettings, validation: Validation, items: Sequence[Sample], base: Base
) -> tuple[list[Sample], list[Sample]]:
    """What is learnt from, and what is held out: a folder of its own, or a share of each concept's pictures."""
    concepts = {id(one.part): one.part for one in items}
    if validation.images:
        held = collect(data, read_held_out(validation.images, list(concepts.values())), base)
        learnt = {one.picture.content for one in items}
        if same := [one.picture.name for one in held if one.picture.content in learnt]:
            warnings.warn(
                f"{pluralize(len(same), 'picture')} of validation.images {'is' if len(same) == 1 else 'are'} learnt "
                f"from as well ({named(same)}): their loss says nothing of others.",
                stacklevel=2,
            )
        return list(items), held
    if not validation.share:
        return list(items), []
    numbers = [[*concepts].index(id(one.part)) for one in items]
    rows = rows_held_out(validation.share, numbers, [one.picture.content for one in items])
    return [one for row, one in enumerate(items) if row not in rows], [items[row] for row in sorted(rows)]


def step_of(base: Base) -> int:
    """What sides of pictures are multiples of."""
    return math.lcm(base.vae_scale_factor, 8)


def examples_of(data: DataSettings, base: Base, items: Sequence[Sample], title: str) -> Examples:
    """The items, encoded.

    Raises:
        DiffgraftError: none of them can be opened.
    """
    pictures, ways = [one.picture for one in items], [one.frames for one in items]
    encoded = encode_cached(base, pictures, ways, masked=data.masks.use, keep=data.cache, title=title)
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
            one.picture.content + (one.picture.mask_content if data.masks.use else ""),
        )
        for place, one in enumerate(items)
        if place in encoded.rows
    ]
    return Examples(encoded, examples, data.tags, data.caption_dropout, data.masks)


def class_examples(data: DataSettings, seed: int, base: Base, items: Sequence[Sample]) -> Examples | None:
    """The class images of all concepts, each with its λ for a weight; None without such prior preservation."""
    found: list[Sample] = []
    classes: dict[tuple[str, str, str], list[Sample]] = {}
    for one in items:
        if (prior := one.part.prior_preservation) is not None and prior.by == "pictures":
            # concepts of one class share its pictures
            key = (prior.model_dump_json(), one.part.class_text(None), one.part.trigger)
            classes.setdefault(key, []).append(one)
    for own in classes.values():
        part = own[0].part
        prior = part.prior_preservation
        assert prior is not None
        weighted = part.model_copy(update={"weight": prior.weight})
        kept = own_class(weighted, prior) if prior.folder else _drawn_class(weighted, seed, base, own)
        for repeats, prompt, picture in kept:
            way = frames(picture.size, resolution_of(data, base), data.buckets, step_of(base))
            said = PromptBuilder((prompt,))
            each = weighted.model_copy(update={"repeats": repeats})
            found.append(Sample(each, picture, said, said, with_mirrored(way) if data.flip else way))
    if not found:
        return None
    bare = data.model_copy(update={"masks": data.masks.model_copy(update={"use": False}), "caption_dropout": 0.0})
    return examples_of(bare, base, found, "encoding class images")


def weight_by_prediction(read: ConceptImages) -> float:
    """λ of prior preservation by what the bare base says; 0 where there is none such.

    Raises:
        DiffgraftError: concepts have their classes preserved in different ways.
    """
    priors = [prior for part, _ in read if (prior := part.prior_preservation) is not None]
    weights = {one.weight for one in priors if one.by == "prediction"}
    if weights and (len(weights) > 1 or any(one.by == "pictures" for one in priors)):
        raise DiffgraftError(
            "Prior preservation is by prediction for some concepts and otherwise for others: give all of them the same "
            "prior.by and, by prediction, the same prior.weight."
        )
    return max(weights, default=0.0)


def own_class(part: DataSettings, prior: Prior) -> Iterator[tuple[int, str, Picture]]:
    """Class images that a person has: repeats, prompt and picture; of kohya's folders as they say.

    Raises:
        DiffgraftError: there is no such folder, or no picture in it.
    """
    captions = part.captions.model_copy(update={"use": True})
    own = {"images": prior.folder, "layout": "auto", "repeats": 1, "captions": captions}
    own |= {"prompt": part.class_text(None), "trigger": ""}
    for found, pictures in read_part(part.model_copy(update=own), has_setting=False):
        for picture in pictures:
            yield found.repeats, next(iter(captions_of(found, picture)), found.prompt), picture


def _drawn_class(
    part: DataSettings, seed: int, base: Base, items: Sequence[Sample]
) -> Iterable[tuple[int, str, Picture]]:
    """Class images that the base draws."""
    prior = part.prior_preservation
    assert prior is not None
    captions: list[str | None] = []
    for one in items:
        captions += captions_of(one.part, one.picture) or (None,)
    texts = part.class_prompts(captions)
    if len(texts) > prior.images:  # each is drawn at least once
        rows = torch.randperm(len(texts), generator=generator(seed))[: prior.images]
        texts = [texts[row] for row in sorted(rows.tolist())]
    side = resolution_of(part, base)
    each = math.ceil(prior.images / len(texts)) if texts else 0
    for prompt, picture in class_images(base, texts, each, Settings(size=(side, side)), seed) if texts else ():
        yield 1, prompt, picture


def all_prompts(data: DataSettings, *said: Examples | None) -> list[str] | None:
    """Every prompt that can come up, None where they are without number."""
    if not is_fixed(data.tags):
        return None
    found = [""] if data.caption_dropout or data.long_prompts == "chunk" else []
    for examples in said:
        for one in examples.examples if examples else ():
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
