"""Likely mistakes in a recipe: settings without effect, triggers that have a meaning already, duplicate images."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffgraft.bases import Base
from diffgraft.data.captions import is_fixed, mentions
from diffgraft.data.inventory import list_names
from diffgraft.data.near_duplicates import Fingerprint, fingerprint, near_duplicates
from diffgraft.data.pictures import UnreadablePictureError
from diffgraft.progress import track
from diffgraft.trainers.objectives.registry import objectives, reads_captions
from diffgraft.trainers.optim.optimizers import lr_warning
from diffgraft.trainers.recipe.groups import DataSettings
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.recipe.settings import Loss, Prior
from diffgraft.trainers.training_data.build import Sample
from diffgraft.trainers.training_data.prompts import captions_of

_OFTEN_CUT = 0.1
"""Mean share of the images' area that is cropped, above which buckets are recommended"""
_COMMON = 20_000
"""CLIP's token ids are ordered by frequency; tokens below this id have a meaning to it"""
_MAX_COMPARED = 500
"""Maximum number of images that are opened and compared with each other"""
_MIN_COMPARED, _MAX_PIXELS = 40, 120e6
"""The first images are always compared; further ones up to this number of pixels in all, about 4 seconds for PNGs"""


def setting_conflicts(recipe: Recipe, samples: Sequence[Sample]) -> Iterator[str]:
    """Yield a sentence for each setting that has no effect or contradicts another one."""
    separated = any(recipe.tags.separator in text for sample in samples for text in sample.prompt_builder.texts)
    if not is_fixed(recipe.tags) and not separated:
        yield f"tags.shuffle and tags.drop do nothing: no caption contains the separator {recipe.tags.separator!r}."
    if not is_fixed(recipe.tags) and not recipe.text_encoder:
        yield (
            "with tags.shuffle or tags.drop there are too many prompts to cache: the text encoder stays in memory and "
            "runs in every step."
        )
    if recipe.insert_trigger and not any(_was_inserted(sample) for sample in samples):
        yield "insert_trigger=true does nothing: all prompts contain the trigger."
    masked = [sample.picture.name for sample in samples if sample.picture.mask_file is not None]
    if masked and not recipe.masks.use:
        yield f"the masks of {list_names(masked)} are not used: set masks.use=true to use them."
    if recipe.masks.use and not any(sample.picture.has_mask for sample in samples):
        yield "masks.use=true does nothing: no image has a NAME_mask.png beside it or an alpha channel."
    if recipe.validation.images and recipe.validation.share:
        yield "validation.share does nothing with validation.images, which are held out instead."
    if recipe.validation.is_on and recipe.validation.every > recipe.steps:
        every = f"validation.every={recipe.validation.every}"
        yield f"{every} exceeds steps={recipe.steps}: validation runs only after the last step."
    if recipe.validation.patience and not recipe.validation.is_on:
        yield "validation.patience does nothing without validation.images or validation.share."
    if recipe.warmup >= recipe.steps:
        yield f"warmup={recipe.warmup} lasts for all of the {recipe.steps} steps: lr is never reached."
    if recipe.text_encoder_stop is not None and recipe.text_encoder_stop >= recipe.steps:
        yield f"text_encoder_stop={recipe.text_encoder_stop} is not below steps={recipe.steps}, so it does nothing."
    if recipe.adapter_every > recipe.steps:
        yield f"adapter_every={recipe.adapter_every} exceeds steps={recipe.steps}: no intermediate adapter is saved."
    if warning := lr_warning(recipe.optim):
        yield warning
    if recipe.ema and recipe.ema**recipe.steps > 0.1:
        share = recipe.ema**recipe.steps
        yield f"ema={recipe.ema} is too slow for {recipe.steps} steps: {share:.0%} of the initial values would remain."
    if recipe.crop == "random" and all(sample.frames[0].size == sample.frames[0].scaled for sample in samples):
        yield "crop=random does nothing: no image has to be cropped."
    prior = getattr(recipe, "prior", None)
    if (
        prior is not None
        and prior.folder
        and Path(prior.folder).resolve() in {Path(sample.concept.images).resolve() for sample in samples}
    ):
        yield "prior.folder is the folder of the training images: class images should show other members of the class."
    if prior is not None and prior.folder and prior.by == "prediction":
        yield "prior.folder does nothing with prior.by=prediction."
    if prior is not None and "images" in prior.model_fields_set and prior.by == "prediction":
        yield "prior.images does nothing with prior.by=prediction, which uses no class images."
    yield from _objective_conflicts(recipe.loss, prior, is_validated=recipe.validation.is_on)
    triggers = [concept.trigger for concept in recipe.concepts]
    if triggers and "trigger" in recipe.model_fields_set and all(triggers) and recipe.trigger not in triggers:
        yield f"trigger={recipe.trigger} is the trigger of no concept: only samples are generated with it."
    yield from _noun_conflicts(recipe.noun, samples)
    if reads_captions(recipe.loss.objective) and not any(
        text.strip() for sample in samples for text in sample.prompt_builder.prompts()
    ):
        yield "all prompts are empty: add captions, or set prompt."
    if recipe.caption_dropout and recipe.method == "textual-inversion":
        yield "caption_dropout drops the trained token as well, so that nothing is learned from such samples."


def _objective_conflicts(loss: Loss, prior: Prior | None, *, is_validated: bool) -> Iterator[str]:
    """Yield a sentence for each setting that has no effect with the chosen objective."""
    if not (name := loss.objective):
        return
    kind = objectives()[name]
    for key in ("kind", "snr_gamma", "debiased") if kind.has_own_error else ():
        if key in loss.model_fields_set:
            yield f"loss.{key} does nothing with loss.objective={name}, which has an error of its own."
    if kind.has_own_error and is_validated:
        yield f"validation measures the error of the prediction, and not what loss.objective={name} minimizes."
    if not kind.uses_prior and prior is not None and prior.weight:
        yield f"prior preservation does nothing with loss.objective={name}: set prior.weight=0."


def _was_inserted(sample: Sample) -> bool:
    """Whether the trigger was prepended to a caption or the prompt of a sample."""
    texts = captions_of(sample.concept, sample.picture) or (sample.concept.fill(sample.concept.prompt),)
    return sample.concept.templates == "none" and any(not mentions(text, sample.concept.trigger) for text in texts)


def _noun_conflicts(noun: str, samples: Sequence[Sample]) -> Iterator[str]:
    """Warn of numbered folders whose names have other class nouns than the recipe."""
    concepts = {sample.concept.images: sample.concept for sample in samples}
    others = [
        concept for concept in concepts.values() if concept.layout == "flat" and not mentions(concept.prompt, noun)
    ]
    if noun and len(concepts) > 1 and others:
        yield (
            f"the images in {list_names([Path(concept.images).name for concept in others])} are learned as a {noun}, "
            "too: for other classes use concepts, each with its own images, trigger and subject."
        )


def trigger_word_warnings(base: Base, samples: Sequence[Sample]) -> Iterator[str]:
    """Warn of triggers that have a meaning already, or that concepts share."""
    nouns_of: dict[str, set[str]] = {}
    for concept in {id(sample.concept): sample.concept for sample in samples}.values():
        nouns_of.setdefault(concept.trigger, set()).add(concept.noun)
    for trigger, nouns in nouns_of.items():
        if not trigger:
            continue
        if len(nouns) > 1:
            yield f"the trigger {trigger!r} is shared by several concepts: {', '.join(sorted(nouns))}."
        if trigger in nouns:
            yield f"the trigger {trigger!r} equals the class noun: subject and class cannot be told apart."
        tokens: list[str] = base.tokenizer.tokenize(trigger)
        ids: list[int] = base.tokenizer.convert_tokens_to_ids(tokens)
        if len(tokens) == 1 and ids[0] < _COMMON and type(base.tokenizer).__name__.startswith("CLIP"):
            yield f"the trigger {trigger!r} is a common word to the base: its meaning will mix with the subject."
        class_texts = {text for sample in samples for text in sample.class_prompt_builder.prompts()}
        if any(mentions(text, trigger) for text in class_texts):
            yield f"the trigger {trigger!r} occurs in a class prompt, so the class will learn it, too."


def compute_fingerprints(samples: Sequence[Sample]) -> tuple[list[tuple[str, Fingerprint]], dict[int, str]]:
    """Open the first images; return names and fingerprints, and index → warning for those that cannot be opened."""
    pixels = itertools.accumulate(math.prod(sample.picture.size) for sample in samples)
    within_limit = sum(count <= _MAX_PIXELS for count in pixels)
    compared = list(samples)[: min(_MAX_COMPARED, max(_MIN_COMPARED, within_limit))]
    fingerprints: list[tuple[str, Fingerprint]] = []
    unreadable: dict[int, str] = {}
    for index, sample in enumerate(track(compared, "comparing pictures", min_items=50)):
        try:
            fingerprints.append((sample.picture.name, fingerprint(sample.picture.image)))
        except UnreadablePictureError as error:
            unreadable[index] = (
                f"{error.name} is skipped: it cannot be read as an image ({error.why}). Save it again as JPEG or PNG."
            )
    return fingerprints, unreadable


def crop_warnings(data: DataSettings, samples: Sequence[Sample]) -> Iterator[str]:
    """Warn if square crops lose much of the images."""
    share = sum(1 - sample.frames[0].fraction_of_picture for sample in samples) / len(samples)
    if share > _OFTEN_CUT and not data.buckets.use and data.crop == "center":
        yield f"square crops lose {share:.0%} of the images: buckets.use=true keeps their shapes approximately."


def duplicate_warnings(fingerprints: Sequence[tuple[str, Fingerprint]]) -> Iterator[str]:
    """Warn of pairs of images that are nearly the same."""
    pairs = near_duplicates(fingerprints)
    for a, b in pairs[:5]:
        yield f"{a} and {b} are nearly the same image."
    if len(pairs) > 5:
        yield f"{len(pairs) - 5} more pairs of images are nearly the same."
