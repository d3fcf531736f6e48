"""What a person may not have meant: settings that do nothing, triggers that mean something, pictures that repeat."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffgraft.bases import Base
from diffgraft.data.captions import is_fixed, mentions
from diffgraft.data.inventory import named
from diffgraft.data.near_duplicates import Fingerprint, fingerprint, near_duplicates
from diffgraft.data.pictures import UnreadablePictureError
from diffgraft.progress import track
from diffgraft.trainers.optim.optimizers import lr_warning
from diffgraft.trainers.recipe.groups import DataSettings
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.training_data.build import Sample
from diffgraft.trainers.training_data.prompts import captions_of

_OFTEN_CUT = 0.1
"""Of all pictures, so much cut away is worth advice"""
_COMMON = 20_000
"""CLIP's words are numbered by how common they were; those below mean something to it"""
_LOOKED_AT = 500
"""Pictures that are opened and compared with one another, at most"""
_FEW, _PIXELS = 40, 120e6
"""So many are in any case, and others while all of them together have no more pixels: what PNGs take 4 seconds for"""


def conflicts(recipe: Recipe, learnt: Sequence[Sample]) -> Iterator[str]:
    """Settings that do not go together, or do nothing."""
    separated = any(recipe.tags.separator in text for one in learnt for text in one.wording.texts)
    if not is_fixed(recipe.tags) and not separated:
        yield f"tags are to be shuffled or dropped, and no caption holds the separator {recipe.tags.separator!r}."
    if not is_fixed(recipe.tags) and not recipe.text_encoder:
        yield (
            "with tags.shuffle or tags.drop prompts are too many to be worked out ahead: the text encoder stays in "
            "memory, and is asked in every step."
        )
    if recipe.insert_trigger and not any(_was_inserted(one) for one in learnt):
        yield "insert_trigger=true does nothing: all prompts have the trigger."
    masked = [one.picture.name for one in learnt if one.picture.mask_file is not None]
    if masked and not recipe.masks.use:
        yield f"the masks of {named(masked)} are not used: set masks.use=true, if they are meant."
    if recipe.masks.use and not any(one.picture.has_mask for one in learnt):
        yield "masks.use=true does nothing: no picture has a NAME_mask.png beside it or an alpha channel."
    if recipe.validation.images and recipe.validation.share:
        yield "validation.share does nothing with validation.images, which are held out in its place."
    if recipe.validation.is_on and recipe.validation.every > recipe.steps:
        every = f"validation.every={recipe.validation.every}"
        yield f"{every} is past steps={recipe.steps}: nothing is validated on the way."
    if recipe.validation.patience and not recipe.validation.is_on:
        yield "validation.patience does nothing without validation.images or validation.share."
    if recipe.warmup >= recipe.steps:
        yield f"warmup={recipe.warmup} is not over before the {recipe.steps} steps are."
    if recipe.text_encoder_stop is not None and recipe.text_encoder_stop >= recipe.steps:
        yield f"text_encoder_stop={recipe.text_encoder_stop} comes after the {recipe.steps} steps, and does nothing."
    if recipe.adapter_every > recipe.steps:
        yield f"adapter_every={recipe.adapter_every} is more than the {recipe.steps} steps: none is kept on the way."
    if said := lr_warning(recipe.optim):
        yield said
    if recipe.ema and recipe.ema**recipe.steps > 0.1:
        left = recipe.ema**recipe.steps
        yield f"ema={recipe.ema} is slow for {recipe.steps} steps: {left:.0%} of the start would be left."
    if recipe.crop == "random" and all(one.frames[0].size == one.frames[0].scaled for one in learnt):
        yield "crop=random does nothing: all pictures have the shape that is shown."
    prior = getattr(recipe, "prior", None)
    if (
        prior is not None
        and prior.folder
        and Path(prior.folder).resolve() in {Path(one.part.images).resolve() for one in learnt}
    ):
        yield "prior.folder is the folder of the pictures themselves: class images show others of the class."
    if prior is not None and prior.folder and prior.by == "prediction":
        yield "prior.folder does nothing with prior.by=prediction."
    if prior is not None and "images" in prior.model_fields_set and prior.by == "prediction":
        yield "prior.images does nothing with prior.by=prediction, which draws none."
    own = [one.trigger for one in recipe.concepts]
    if own and "trigger" in recipe.model_fields_set and all(own) and recipe.trigger not in own:
        yield f"trigger={recipe.trigger} is of no concept, as each has its own: samples alone are drawn with it."
    yield from _one_noun(recipe.noun, learnt)
    if not any(text.strip() for one in learnt for text in one.wording.prompts()):
        yield "all prompts are empty: give captions, or a prompt."
    if recipe.caption_dropout and recipe.method == "textual-inversion":
        yield "caption_dropout leaves the word out as well, and nothing learns from such pictures."


def _was_inserted(one: Sample) -> bool:
    """Whether the trigger was put before what is said of a picture."""
    said = captions_of(one.part, one.picture) or (one.part.fill(one.part.prompt),)
    return one.part.templates == "none" and any(not mentions(text, one.part.trigger) for text in said)


def _one_noun(noun: str, learnt: Sequence[Sample]) -> Iterator[str]:
    """Numbered folders that say other nouns than the recipe's."""
    parts = {one.part.images: one.part for one in learnt}
    others = [one for one in parts.values() if one.layout == "flat" and not mentions(one.prompt, noun)]
    if noun and len(parts) > 1 and others:
        yield (
            f"what is in {named([Path(one.images).name for one in others])} is learnt as a {noun}, too: what is of "
            "another class belongs into concepts, each with its own images, trigger and subject."
        )


def triggers(base: Base, learnt: Sequence[Sample]) -> Iterator[str]:
    """Triggers that mean something already, or that two concepts share."""
    called: dict[str, set[str]] = {}
    for part in {id(one.part): one.part for one in learnt}.values():
        called.setdefault(part.trigger, set()).add(part.noun)
    for trigger, nouns in called.items():
        if not trigger:
            continue
        if len(nouns) > 1:
            yield f"the trigger {trigger!r} calls several concepts: {', '.join(sorted(nouns))}."
        if trigger in nouns:
            yield f"the trigger {trigger!r} is the class noun itself: nothing tells the subject from its class."
        tokens: list[str] = base.tokenizer.tokenize(trigger)
        ids: list[int] = base.tokenizer.convert_tokens_to_ids(tokens)
        if len(tokens) == 1 and ids[0] < _COMMON and type(base.tokenizer).__name__.startswith("CLIP"):
            yield f"the trigger {trigger!r} is a common word of the base's: what it means will mix with what is learnt."
        class_texts = {text for one in learnt for text in one.class_wording.prompts()}
        if any(mentions(text, trigger) for text in class_texts):
            yield f"the trigger {trigger!r} stands in a prompt of the class, so the class will learn it, too."


def looked_at(learnt: Sequence[Sample]) -> tuple[list[tuple[str, Fingerprint]], dict[int, str]]:
    """Names and fingerprints of the first pictures, and of those that cannot be opened their rows, and what is said."""
    pixels = itertools.accumulate(math.prod(one.picture.size) for one in learnt)
    most = sum(count <= _PIXELS for count in pixels)
    looked, seen, broken = list(learnt)[: min(_LOOKED_AT, max(_FEW, most))], [], {}
    for row, one in enumerate(track(looked, "comparing pictures", min_items=50)):
        try:
            seen.append((one.picture.name, fingerprint(one.picture.image)))
        except UnreadablePictureError as error:
            broken[row] = f"{error.name} is left out: it cannot be read as a picture ({error.why})."
    return seen, broken


def squares(data: DataSettings, learnt: Sequence[Sample]) -> Iterator[str]:
    """Shapes that squares do not suit."""
    share = sum(1 - one.frames[0].area_fraction for one in learnt) / len(learnt)
    if share > _OFTEN_CUT and not data.buckets.use and data.crop == "center":
        yield f"squares cut away {share:.0%} of the pictures: buckets.use=true keeps about their shapes."


def likenesses(seen: Sequence[tuple[str, Fingerprint]]) -> Iterator[str]:
    """Pairs of pictures that are nearly the same."""
    pairs = near_duplicates(seen)
    for a, b in pairs[:5]:
        yield f"{a} and {b} are nearly the same picture."
    if len(pairs) > 5:
        yield f"{len(pairs) - 5} more pairs of pictures are nearly the same."
