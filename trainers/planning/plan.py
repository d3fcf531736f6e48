"""What a run would do, told in seconds and without loading weights: its pictures, its steps, its cost, its pitfalls."""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffgraft.bases import Base
from diffgraft.bases.meta_base import meta_base, without_values
from diffgraft.data.inventory import pluralize
from diffgraft.data.picture_lists import save_picture_lists
from diffgraft.disk import format_bytes
from diffgraft.errors import DiffgraftError, shorten
from diffgraft.terminal import printable
from diffgraft.trainers.hooks.trackers import check_trackers
from diffgraft.trainers.planning.advice import advice
from diffgraft.trainers.planning.estimate import Cost, Workload, cost, speed
from diffgraft.trainers.planning.pitfalls import conflicts, likenesses, looked_at, squares, triggers
from diffgraft.trainers.recipe.groups import OptimSettings
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.attach import attach
from diffgraft.trainers.run.checks import check_base, check_family, check_pictures, check_settings
from diffgraft.trainers.run.folder import check_output, recipe_with
from diffgraft.trainers.run.init_from import read_init_adapter
from diffgraft.trainers.run.train import DTYPES
from diffgraft.trainers.runtime.processes import new_accelerator
from diffgraft.trainers.runtime.shards import check_compatible, check_shards
from diffgraft.trainers.training_data.build import Sample, collect, resolution_of, split
from diffgraft.trainers.training_data.concepts import ConceptImages, read_concepts
from diffgraft.trainers.training_data.prompts import captions_of

_MUCH_CUT = 0.3
"""Of a picture, so much cut away is worth a word"""
_DRAWING = 25 * 2
"""Passes of the UNet for a picture that is drawn: steps, with and without its prompt"""


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    facts: list[tuple[str, str]]
    """What it is about → what there is"""
    pitfalls: list[str]
    """What a person may not have meant"""

    def lines(self) -> list[str]:
        """One for each fact and pitfall."""
        width = max(len(name) for name, _ in self.facts)
        facts = [f"{name:{width}}  {said}" for name, said in self.facts]
        return [printable(line) for line in (*facts, *(f"look at: {said}" for said in self.pitfalls))]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def make_plan(recipe: Recipe, device: torch.device, dtype: torch.dtype, given: Base | None = None) -> Plan:
    """Plan a run of `recipe` on a device; of the base, only configuration and tokenizers are read.

    `given` is a loaded base in the place of the recipe's.

    Raises:
        DiffgraftError: what `train` would refuse before it starts.
    """
    check_settings(recipe.model, recipe.adapter, recipe.optim, recipe.objective, recipe.runtime, recipe.outputs, device)
    model, data = recipe.model, recipe.data
    base = without_values(given) if given else meta_base(model.base, dtype, **model.schedule_options())
    check_family(recipe.groups(), base)
    check_base(data, recipe.objective, base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe, read = read_concepts(recipe)
        check_pictures(read)
        data = recipe.data
        samples = collect(data, read, base)
        learnt, held = split(data, recipe.validation, samples, base)
    seen, broken = looked_at(learnt)
    learnt = [one for row, one in enumerate(learnt) if row not in broken]
    if not learnt:
        raise DiffgraftError(f"None of the {len(broken)} pictures can be opened. Save them again as JPEG or PNG.")
    sizes = Counter(one.frames[0].size for one in learnt)
    largest = max(sizes, key=math.prod)
    prompts = sorted({prompt for one in learnt for prompt in one.wording.prompts()}, key=len)[-1:]
    passes = 2 if any(part.prior_preservation for part, _ in read) else 1
    start = read_init_adapter(recipe.init_from, base) if recipe.init_from else None
    optim, is_whole = recipe.optim, data.long_prompts == "chunk"
    checkpointing = recipe.runtime.gradient_checkpointing
    work = Workload(largest, prompts, optim.batch * passes, optim.accumulate, checkpointing)
    found = cost(base, lambda: attach(recipe, base, start), work, optim, model.quantize, whole=is_whole)
    facts = [
        (
            "recipe",
            f"{recipe.task} by {recipe.method} on {recipe.base} ({base.family.name}, {resolution_of(data, base)} px)",
        ),
        ("computes", f"on {device}, in {recipe.precision}"),
        (
            "predicts",
            f"{base.parameterization.name}, as {'the recipe says' if model.says_prediction else 'its files say'}",
        ),
        *_pictures(data.masks.use, recipe.validation.every, learnt, held),
        ("sizes", ", ".join(f"{w}x{h}: {count}" for (w, h), count in sorted(sizes.items()))),
        *_cuts(learnt),
        *_words(learnt),
        ("trigger", ", ".join(dict.fromkeys(part.trigger for part, _ in read))),
        *_class_images(read),
        ("steps", _rounds(optim, learnt)),
        *_costs(optim.steps, base, found, read, device),
    ]
    told = dict.fromkeys(str(one.message) for one in caught)
    pitfalls = [*told, *broken.values(), *conflicts(recipe, learnt), *triggers(base, learnt), *likenesses(seen)]
    return Plan(
        facts, [*pitfalls, *squares(data, learnt), *advice(recipe.task, data, recipe.adapter, base, learnt, seen)]
    )


def _pictures(masked: bool, every: int, learnt: Sequence[Sample], held: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    ways = Counter(len(one.frames) for one in learnt)
    shown = "" if set(ways) == {1} else f", each in {' or '.join(str(n) for n in sorted(ways))} ways (cuts, mirrored)"
    concepts = len({id(one.part) for one in learnt})
    yield "pictures", f"{len(learnt)}{f' of {concepts} concepts' if concepts > 1 else ''}{shown}"
    if held:
        yield "held out", f"{len(held)}, every {every} steps"
    if masked:
        count = sum(one.picture.has_mask for one in learnt)
        yield "masks", f"{count} of {pluralize(len(learnt), 'picture')} with one"


def _cuts(learnt: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    cut = [1 - one.frames[0].area_fraction for one in learnt]
    most = max(range(len(cut)), key=cut.__getitem__)
    if cut[most] > 0.005:
        name, much = learnt[most].picture.name, sum(share > _MUCH_CUT for share in cut)
        said = f"{sum(cut) / len(cut):.0%} of the area on average, at most {cut[most]:.0%} ({name})"
        yield "cut away", said + (f"; over {_MUCH_CUT:.0%} of {pluralize(much, 'picture')}" if much else "")
    grown = [one for one in learnt if one.frames[0].scaled[0] > one.frames[0].original[0]]
    if grown:
        yield "enlarged", f"{pluralize(len(grown), 'picture')}, such as {grown[0].picture.name}"


def _words(learnt: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    with_own = sum(bool(captions_of(one.part, one.picture)) for one in learnt)
    texts = Counter(prompt for one in learnt for prompt in one.wording.prompts())
    first = next(iter(texts))
    yield (
        "captions",
        f"{with_own} of {pluralize(len(learnt), 'picture')}; {pluralize(len(texts), 'prompt')}, such as: "
        f"{shorten(first)}",
    )


def _class_images(read: ConceptImages) -> Iterator[tuple[str, str]]:
    for part, pictures in read:
        if (prior := part.prior_preservation) is None:
            continue
        if prior.by == "prediction":
            yield "class", f"preserved by the frozen base's own prediction for: {part.class_text(None)}"
        elif prior.folder:
            yield "class", f"images of {prior.folder}"
        else:
            captions = [caption for one in pictures for caption in captions_of(part, one) or (None,)]
            texts = part.class_prompts(captions)
            said = f"{pluralize(prior.images, 'image')}, drawn unless cached, of {pluralize(len(texts), 'prompt')}"
            yield "class", f"{said}, such as: {shorten(texts[0])}"


def _rounds(optim: OptimSettings, learnt: Sequence[Sample]) -> str:
    a_round = sum(one.part.repeats for one in learnt)
    shown = optim.steps * optim.batch * optim.accumulate
    times = shown / a_round
    each, rounds = pluralize(optim.batch * optim.accumulate, "picture"), f"{times:,.1f}".removesuffix(".0")
    return f"{optim.steps}, of {each} each: {rounds} {'round' if times == 1 else 'rounds'} of {a_round}"


def _costs(steps: int, base: Base, found: Cost, read: ConceptImages, device: torch.device) -> Iterator[tuple[str, str]]:
    yield "trained", f"{found.trained:,} numbers; a file of about {format_bytes(found.file)}"
    parts = {"frozen weights": found.weights, "what trains": found.training, "activations": found.activations}
    listed = ", ".join(f"{format_bytes(count)} of {name}" for name, count in parts.items())
    yield "memory", f"about {format_bytes(found.memory)} on each device: {listed}"
    rate = speed(base, device)
    priors = [prior for part, _ in read if (prior := part.prior_preservation) is not None]
    drawn = sum(prior.images for prior in priors if prior.by == "pictures" and not prior.folder)
    said = f"about {_time(steps * found.step / rate)} for the steps"
    if drawn:
        said += f", {_time(drawn * _DRAWING * found.picture / rate)} for class images"
    yield "time", f"{said} ({device.type}, {rate / 1e9:,.0f} GFLOP/s on a part of this UNet)"


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def planned(recipe: str | Path, settings: dict[str, Any]) -> Plan:
    """The plan of a recipe by its name or path, with settings as `train` takes them; `base` may be a loaded one."""
    given = settings["base"] if isinstance(settings.get("base"), Base) else None
    named = {**settings, "base": given.name} if given else settings
    plan = recipe_with(recipe, save_picture_lists(named))
    check_output(plan.output, plan.folders())
    check_trackers(plan.trackers)  # accelerate says less of those that are not there
    accelerator = new_accelerator(plan.runtime, plan.outputs)
    check_compatible(plan.runtime, plan.quantize)
    check_shards(plan.shard, accelerator)
    return make_plan(plan, accelerator.device, DTYPES[plan.precision], given)
