"""What a run would do, told in seconds and without loading weights: its pictures, its steps, its cost, its pitfalls."""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffgraft.bases import Base
from diffgraft.bases.outline import outline
from diffgraft.data.likeness import Fingerprint, alike, fingerprint
from diffgraft.data.source import counted_folders, unreadable
from diffgraft.data.wording import is_fixed
from diffgraft.errors import DiffgraftError, printable
from diffgraft.room import said_size
from diffgraft.trainers.attach import attach
from diffgraft.trainers.estimate import Cost, cost, speed
from diffgraft.trainers.folder import recipe_with
from diffgraft.trainers.materials import Item, Read, collect, prior_of, read_pictures, side_of, split, step_of
from diffgraft.trainers.optimizers import odd_rate
from diffgraft.trainers.processes import new_accelerator
from diffgraft.trainers.recipe import Recipe
from diffgraft.trainers.run import DTYPES, check_resolution
from diffgraft.trainers.shards import check_alone
from diffgraft.trainers.speed import check_speed
from diffgraft.trainers.start import read_start
from diffgraft.trainers.trackers import check_trackers

_MUCH_CUT = 0.3
"""Of a picture, so much cut away is worth a word"""
_OFTEN_CUT = 0.1
"""Of all pictures, so much cut away is worth advice"""
_COMMON = 20_000
"""CLIP's words are numbered by how common they were; those below mean something to it"""
_DRAWING = 25 * 2
"""Passes of the UNet for a picture that is drawn: steps, with and without its prompt"""
_LOOKED_AT = 2_000
"""Pictures that are compared with one another at most"""


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    facts: list[tuple[str, str]]
    """What it is about → what there is"""
    pitfalls: list[str]
    """What a person may not have meant"""

    def lines(self) -> list[str]:
        """Facts and pitfalls, a line each."""
        width = max(len(name) for name, _ in self.facts)
        return [*(f"{name:{width}}  {said}" for name, said in self.facts), *(f"look at: {s}" for s in self.pitfalls)]

    def __str__(self) -> str:
        return "\n".join(map(printable, self.lines()))


def make_plan(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Plan:
    """Plan a run of `recipe` on a device; of the base, only configuration and tokenizers are read.

    Raises:
        DiffgraftError: what `train` would refuse before it starts.
    """
    read = read_pictures(recipe)
    base = outline(recipe.base, dtype, prediction_type=recipe.prediction_type, zero_snr=recipe.zero_snr)
    check_resolution(recipe, base)
    check_alone(recipe)
    check_speed(recipe, device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        items = collect(recipe, read, base.tokenizer, side_of(recipe, base), step_of(base))
        learnt, held = split(recipe, items, base)
    seen, broken = _looked_at(learnt)
    learnt = [one for row, one in enumerate(learnt) if row not in broken]
    if not learnt:
        raise DiffgraftError(f"None of the {len(broken)} pictures can be opened. Save them again as JPEG or PNG.")
    sizes = Counter(one.frames[0].size for one in learnt)
    largest = max(sizes, key=math.prod)
    prompts = sorted({prompt for one in learnt for prompt in one.wording.prompts()}, key=len)[-1:]
    passes = 2 if any(prior_of(part) is not None for part, _ in read) else 1
    start = read_start(recipe.init_from) if recipe.init_from else None
    found = cost(recipe, base, lambda: attach(recipe, base, start), largest, prompts, passes)
    facts = [
        (
            "recipe",
            f"{recipe.task} by {recipe.method} on {recipe.base} ({base.family.name}, {side_of(recipe, base)} px)",
        ),
        *_pictures(recipe, learnt, held),
        ("sizes", ", ".join(f"{w}x{h}: {count}" for (w, h), count in sorted(sizes.items()))),
        *_cuts(learnt),
        *_words(recipe, learnt),
        *_class_images(recipe, read),
        ("steps", _rounds(recipe, learnt)),
        *_costs(recipe, base, found, read, device),
    ]
    told = [str(one.message) for one in caught]
    pitfalls = [*told, *broken.values(), *_conflicts(recipe, learnt), *_triggers(base, learnt), *_alike(seen)]
    return Plan(facts, [*pitfalls, *_squares(recipe, learnt)])


def _pictures(recipe: Recipe, learnt: Sequence[Item], held: Sequence[Item]) -> Iterator[tuple[str, str]]:
    ways = Counter(len(one.frames) for one in learnt)
    shown = "" if set(ways) == {1} else f", each in {' or '.join(str(n) for n in sorted(ways))} ways (cuts, mirrored)"
    concepts = len({id(one.part) for one in learnt})
    yield "pictures", f"{len(learnt)}{f' of {concepts} concepts' if concepts > 1 else ''}{shown}"
    if held:
        yield "held out", f"{len(held)}, every {recipe.validation.every} steps"
    if recipe.masks.use:
        count = sum(one.picture.mask() is not None for one in learnt)
        yield "masks", f"{count} of {len(learnt)} pictures have one"


def _cuts(learnt: Sequence[Item]) -> Iterator[tuple[str, str]]:
    cut = [1 - one.frames[0].shown for one in learnt]
    most = max(range(len(cut)), key=cut.__getitem__)
    if cut[most] > 0.005:
        name, much = learnt[most].picture.name, sum(share > _MUCH_CUT for share in cut)
        said = f"{sum(cut) / len(cut):.0%} of the area on average, at most {cut[most]:.0%} ({name})"
        yield "cut away", said + (f"; over {_MUCH_CUT:.0%} of {much} pictures" if much else "")
    grown = [one for one in learnt if one.frames[0].scaled[0] > one.frames[0].original[0]]
    if grown:
        yield "enlarged", f"{len(grown)} pictures, such as {grown[0].picture.name}"


def _words(recipe: Recipe, learnt: Sequence[Item]) -> Iterator[tuple[str, str]]:
    with_own = sum(bool(one.picture.captions) and recipe.captions for one in learnt)
    texts = Counter(prompt for one in learnt for prompt in one.wording.prompts())
    first = next(iter(texts))
    yield "captions", f"{with_own} of {len(learnt)} pictures have some; {len(texts)} prompts, such as: {first}"


def _class_images(recipe: Recipe, read: Read) -> Iterator[tuple[str, str]]:
    for part, pictures in read:
        if (prior := prior_of(part)) is None:
            continue
        if prior.by == "prediction":
            yield "class", f"held by what the bare base says as: {part.class_text(None)}"
        elif prior.folder:
            yield "class", f"images of {prior.folder}"
        else:
            captions: list[str | None] = [None]
            if recipe.captions:
                captions = [caption for one in pictures for caption in one.captions or (None,)]
            texts = part.class_prompts(captions)
            said = f"{prior.images} images, drawn if they are not in the cache, of {len(texts)} prompts"
            yield "class", f"{said}, such as: {texts[0]}"


def _rounds(recipe: Recipe, learnt: Sequence[Item]) -> str:
    a_round = sum(one.part.repeats for one in learnt)
    shown = recipe.steps * recipe.batch * recipe.accumulate
    times = shown / a_round
    return f"{recipe.steps}, of {recipe.batch * recipe.accumulate} pictures each: {times:.1f} rounds of {a_round}"


def _costs(recipe: Recipe, base: Base, found: Cost, read: Read, device: torch.device) -> Iterator[tuple[str, str]]:
    yield "trained", f"{found.trained:,} numbers; a file of about {said_size(found.trained * 4)}"
    parts = {"frozen weights": found.weights, "what trains": found.training, "activations": found.activations}
    listed = ", ".join(f"{said_size(count)} of {name}" for name, count in parts.items())
    yield "memory", f"about {said_size(found.memory)} on each device: {listed}"
    rate = speed(base, device)
    priors = [prior for part, _ in read if (prior := prior_of(part)) is not None]
    drawn = sum(prior.images for prior in priors if prior.by == "pictures" and not prior.folder)
    said = f"about {_time(recipe.steps * found.step / rate)} for the steps"
    if drawn:
        said += f", {_time(drawn * _DRAWING * found.picture / rate)} for class images"
    yield "time", f"{said} ({device.type}, {rate / 1e9:,.0f} GFLOP/s on a part of this UNet)"


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _conflicts(recipe: Recipe, learnt: Sequence[Item]) -> Iterator[str]:
    """Settings that do not go together, or do nothing."""
    separated = any(recipe.tags.separator in text for one in learnt for text in one.wording.texts)
    if not is_fixed(recipe.tags) and not separated:
        yield f"tags are to be shuffled or dropped, and no caption holds the separator {recipe.tags.separator!r}."
    if not is_fixed(recipe.tags) and not recipe.text_encoder:
        yield (
            "with tags.shuffle or tags.drop prompts are too many to be worked out ahead: the text encoder stays in "
            "memory, and is asked in every step."
        )
    if recipe.insert_trigger and not any(one.picture.captions for one in learnt):
        yield "insert_trigger=true does nothing: no picture has a caption."
    if recipe.masks.use and not any(one.picture.mask() for one in learnt):
        yield "masks.use=true does nothing: no picture has a NAME_mask.png beside it or an alpha channel."
    if recipe.validation.patience and not recipe.validation.is_on:
        yield "validation.patience does nothing without validation.images or validation.share."
    if recipe.warmup >= recipe.steps:
        yield f"warmup={recipe.warmup} is not over before the {recipe.steps} steps are."
    if recipe.text_encoder_stop is not None and recipe.text_encoder_stop >= recipe.steps:
        yield f"text_encoder_stop={recipe.text_encoder_stop} comes after the {recipe.steps} steps, and does nothing."
    if recipe.adapter_every > recipe.steps:
        yield f"adapter_every={recipe.adapter_every} is more than the {recipe.steps} steps: none is kept on the way."
    if said := odd_rate(recipe):
        yield said
    if recipe.ema and recipe.ema**recipe.steps > 0.1:
        left = recipe.ema**recipe.steps
        yield f"ema={recipe.ema} is slow for {recipe.steps} steps: {left:.0%} of the start would be left."
    if recipe.crop == "random" and all(one.frames[0].size == one.frames[0].scaled for one in learnt):
        yield "crop=random does nothing: all pictures have the shape that is shown."
    prior = getattr(recipe, "prior", None)
    if prior is not None and prior.folder and prior.by == "prediction":
        yield "prior.folder does nothing with prior.by=prediction."
    if prior is not None and "images" in prior.model_fields_set and prior.by == "prediction":
        yield "prior.images does nothing with prior.by=prediction, which draws none."
    if recipe.concepts and "trigger" in recipe.model_fields_set and all(one.trigger for one in recipe.concepts):
        yield f"trigger={recipe.trigger} is of no concept, as each has its own: samples alone are drawn with it."
    if getattr(recipe, "subject", "") and not recipe.concepts and len(counted_folders(recipe.images)) > 1:
        yield (
            f"the folders in {recipe.images} are all learnt as {recipe.trigger!r}, a {getattr(recipe, 'subject', '')}: "
            "what is of another class, or called otherwise, belongs into concepts, each with its own of these keys."
        )
    if not any(text.strip() for one in learnt for text in one.wording.prompts()):
        yield "all prompts are empty: give captions, or a prompt."
    if recipe.caption_dropout and recipe.method == "textual-inversion":
        yield "caption_dropout leaves the word out as well, and nothing learns from such pictures."


def _triggers(base: Base, learnt: Sequence[Item]) -> Iterator[str]:
    """Triggers that mean something already, or that two concepts share."""
    called: dict[str, set[str]] = {}
    for part in {id(one.part): one.part for one in learnt}.values():
        called.setdefault(part.trigger, set()).add(getattr(part, "subject", ""))
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
        if any(trigger in text.split() for text in class_texts):
            yield f"the trigger {trigger!r} stands in a prompt of the class, so the class will learn it, too."


def _looked_at(learnt: Sequence[Item]) -> tuple[list[tuple[str, Fingerprint]], dict[int, str]]:
    """Names and fingerprints of the first pictures, and of those that cannot be opened their rows, and what is said."""
    looked, seen, broken = list(learnt)[:_LOOKED_AT], [], {}
    for row, one in enumerate(tqdm(looked, "comparing pictures", leave=False, disable=len(looked) < 50)):
        try:
            seen.append((one.picture.name, fingerprint(one.picture.image)))
        except Exception as error:  # what the decoders stumble over in a damaged file is of many kinds
            broken[row] = f"{one.picture.name} will be left out: {unreadable(error)}."
    return seen, broken


def _squares(recipe: Recipe, learnt: Sequence[Item]) -> Iterator[str]:
    """Shapes that squares do not suit."""
    share = sum(1 - one.frames[0].shown for one in learnt) / len(learnt)
    if share > _OFTEN_CUT and not recipe.buckets.use and recipe.crop == "center":
        yield f"squares cut away {share:.0%} of the pictures: buckets.use=true keeps about their shapes."


def _alike(seen: Sequence[tuple[str, Fingerprint]]) -> Iterator[str]:
    """Pairs of pictures that are nearly the same."""
    pairs = alike(seen)
    for a, b in pairs[:5]:
        yield f"{a} and {b} are nearly the same picture."
    if len(pairs) > 5:
        yield f"{len(pairs) - 5} more pairs of pictures are nearly the same."


def planned(recipe: str | Path, settings: dict[str, Any]) -> Plan:
    """The plan of a recipe by its name or path, with settings as `train` takes them."""
    plan = recipe_with(recipe, settings)
    check_trackers(plan)  # accelerate says less of those that are not there
    return make_plan(plan, new_accelerator(plan).device, DTYPES[plan.precision])
