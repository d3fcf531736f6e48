"""Plan of a run: its images, steps, cost and pitfalls, found in seconds and without loading weights."""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffgraft.bases import Base
from diffgraft.bases.meta_base import meta_base, without_values
from diffgraft.data.captions import is_fixed
from diffgraft.data.inventory import pluralize
from diffgraft.data.picture_lists import save_picture_lists
from diffgraft.disk import format_bytes
from diffgraft.errors import DiffgraftError, shorten
from diffgraft.generation.graft import Graft
from diffgraft.terminal import printable
from diffgraft.trainers.hooks.trackers import check_trackers
from diffgraft.trainers.objectives.objective import ObjectiveKind
from diffgraft.trainers.objectives.registry import default_objective, objectives
from diffgraft.trainers.planning.advice import advice
from diffgraft.trainers.planning.estimate import Cost, Workload, decoding_flops, denoiser_speed, estimate_cost
from diffgraft.trainers.planning.pitfalls import (
    compute_fingerprints,
    crop_warnings,
    duplicate_warnings,
    setting_conflicts,
    trigger_word_warnings,
)
from diffgraft.trainers.planning.start_check import Bases, check_start
from diffgraft.trainers.recipe.groups import OptimSettings
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.adapter_file import read_adapter_file
from diffgraft.trainers.run.attach import attach
from diffgraft.trainers.run.checks import check_base, check_family, check_pictures, check_prompts, check_settings
from diffgraft.trainers.run.folder import check_output, recipe_with
from diffgraft.trainers.run.train import DTYPES
from diffgraft.trainers.run.under import check_under_file
from diffgraft.trainers.runtime.block_swap import check_swap, check_swap_settings
from diffgraft.trainers.runtime.processes import new_accelerator
from diffgraft.trainers.runtime.shards import check_compatible, check_shards
from diffgraft.trainers.training_data.build import (
    DRAWN,
    Sample,
    collect_samples,
    resolution_of,
    split_samples,
    with_drawn_pictures,
)
from diffgraft.trainers.training_data.concepts import ConceptImages, read_concepts
from diffgraft.trainers.training_data.prompts import captions_of

_MUCH_CUT = 0.3
"""Share of an image's area that is cropped, above which the image is counted as cropped heavily"""
_BUSY = 2e9
"""Operations per second below which a device is taken to be busy with something else"""
_GENERATION_PASSES = 25 * 2
"""Denoiser passes for a generated image: sampling steps, each with and without the prompt"""


_UNCOUNTED = (
    "memory counts the weights of the networks that the objective uses beside the denoiser, and not their activations; "
    "time counts the decoder of the VAE, and not the others."
)


@dataclass(frozen=True)
class Plan:
    """Plan of a run: what it would do, in lines of text."""

    facts: list[tuple[str, str]]
    """Pairs of a topic, such as `memory`, and its description"""
    pitfalls: list[str]
    """Warnings and advice, a sentence each"""

    def lines(self) -> list[str]:
        """Lines of text, one for each fact and pitfall."""
        width = max(len(name) for name, _ in self.facts)
        facts = [f"{name:{width}}  {text}" for name, text in self.facts]
        return [printable(line) for line in (*facts, *(f"look at: {text}" for text in self.pitfalls))]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def make_plan(recipe: Recipe, device: torch.device, dtype: torch.dtype, loaded_base: Base | None = None) -> Plan:
    """Plan a run of `recipe`; of its base, only configuration and tokenizers are loaded.

    Args:
        recipe: the recipe.
        device: the device to train on.
        dtype: the dtype of the base's weights.
        loaded_base: a loaded base to use instead of the recipe's.

    Raises:
        DiffgraftError: `train` would refuse the recipe before it starts.
    """
    check_settings(recipe.model, recipe.adapter, recipe.optim, recipe.objective, recipe.runtime, recipe.outputs, device)
    model, data = recipe.model, recipe.data
    base = without_values(loaded_base) if loaded_base else meta_base(model.base, dtype, **model.layout_options())
    check_family(recipe.groups(), base)
    check_base(data, recipe.objective, base)
    check_swap(recipe.block_swap, base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe, concepts = read_concepts(recipe)
        check_pictures(concepts)
        check_prompts(recipe.objective, concepts)
        data, shown = recipe.data, with_drawn_pictures(concepts, recipe.seed, base)
        samples, held_out = split_samples(data, recipe.validation, collect_samples(data, shown, base), base)
    fingerprints, unreadable = compute_fingerprints(samples) if all(pictures for _, pictures in concepts) else ([], {})
    samples = [sample for index, sample in enumerate(samples) if index not in unreadable]
    if not samples:
        raise DiffgraftError(f"None of the {len(unreadable)} images can be opened: {next(iter(unreadable.values()))}")
    sizes = Counter(sample.frames[0].size for sample in samples)
    largest = max(sizes, key=math.prod)
    longest_prompt = sorted({prompt for sample in samples for prompt in sample.prompt_builder.prompts()}, key=len)[-1:]
    kind = _objective_kind(recipe.loss.objective, concepts)
    strengths = kind.strengths(kind.read_options(recipe.loss.options if recipe.loss.objective else {}))
    passes = kind.predictions * len(strengths) + any(concept.prior_preservation is not None for concept, _ in concepts)
    start = read_adapter_file(recipe.init_from, base) if recipe.init_from else None
    check_start(recipe.adapter, model, Bases(base, loaded_base), start, lambda: attach(recipe, base, start))
    if recipe.under.adapter:
        under = read_adapter_file(recipe.under.adapter, base)
        check_under_file(under)
        Graft(base).check(under.adapter, recipe.under.adapter)
    optim, is_whole = recipe.optim, data.long_prompts == "chunk"
    runtime, has_texts = recipe.runtime, is_fixed(data.tags)
    batch, checkpointing = optim.batch * passes, runtime.gradient_checkpointing
    work = Workload(
        largest, longest_prompt, batch, optim.accumulate, checkpointing, runtime.block_swap, has_texts=has_texts
    )
    estimate = estimate_cost(base, lambda: attach(recipe, base, start), work, model, optim, whole=is_whole)
    pictures = optim.batch * optim.accumulate
    step = estimate.step + kind.bare_predictions * pictures * estimate.image
    if kind.uses_vae:
        step += pictures * decoding_flops(base, largest)
    own = kind.own_bytes(kind.read_options(recipe.loss.options))
    own += sum(value.nbytes for value in base.vae.parameters()) if kind.uses_vae else 0
    estimate = replace(estimate, step=step, weights=estimate.weights + own)
    facts = [
        (
            "recipe",
            f"{recipe.task} by {recipe.method} on {recipe.base} ({base.family.name}, {resolution_of(data, base)} px)",
        ),
        ("computes", f"on {device}, in {recipe.precision}"),
        (
            "predicts",
            f"{base.parameterization.name}, as {'the recipe says' if model.sets_prediction else 'its files say'}",
        ),
        *_image_facts(data.masks.use, recipe.validation.every, samples, held_out),
        ("sizes", ", ".join(f"{w}x{h}: {count}" for (w, h), count in sorted(sizes.items()))),
        *_crop_facts(samples),
        *_prompt_facts(samples),
        *([("trigger", ", ".join(triggers))] if (triggers := _triggers(concepts)) else []),
        *_class_image_facts(concepts),
        ("steps", _epochs(optim, samples)),
        *_cost_facts(optim.steps, base, estimate, concepts, device),
    ]
    pitfalls = [
        *dict.fromkeys(str(warning.message) for warning in caught),
        *unreadable.values(),
        *setting_conflicts(recipe, samples),
        *([_UNCOUNTED] if own else []),
        *trigger_word_warnings(base, samples),
        *duplicate_warnings(fingerprints),
        *crop_warnings(data, samples),
        *advice(recipe.task, data, recipe.adapter, base, samples, fingerprints, recipe.loss.objective),
    ]
    return Plan(facts, pitfalls)


def _image_facts(
    masked: bool, every: int, samples: Sequence[Sample], held_out: Sequence[Sample]
) -> Iterator[tuple[str, str]]:
    crops = Counter(len(sample.frames) for sample in samples)
    variants = " or ".join(str(count) for count in sorted(crops))
    suffix = "" if set(crops) == {1} else f", each in {variants} variants (crops, and their mirror images)"
    concepts = len({id(sample.concept) for sample in samples})
    if (partner := samples[0].picture.partner) is not None:
        suffix += f", each with a {partner.name.partition('/')[0]} one"
    yield "images", f"{len(samples)}{f' of {concepts} concepts' if concepts > 1 else ''}{suffix}"
    if held_out:
        yield "held out", f"{len(held_out)}, every {every} steps"
    if conditions := samples[0].concept.conditions:
        yield "conditions", f"files of {conditions.images}" if conditions.images else f"{conditions.by} of the images"
    if masked:
        count = sum(sample.picture.has_mask for sample in samples)
        yield "masks", f"{count} of {pluralize(len(samples), 'image')} with one"


def _crop_facts(samples: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    cropped = [1 - sample.frames[0].fraction_of_picture for sample in samples]
    worst = max(range(len(cropped)), key=cropped.__getitem__)
    if cropped[worst] > 0.005:
        name, count = samples[worst].picture.name, sum(share > _MUCH_CUT for share in cropped)
        text = f"{sum(cropped) / len(cropped):.0%} of the area on average, at most {cropped[worst]:.0%} ({name})"
        yield "cropped", text + (f"; over {_MUCH_CUT:.0%} of {pluralize(count, 'image')}" if count else "")
    enlarged = [sample for sample in samples if sample.frames[0].scaled[0] > sample.frames[0].original[0]]
    if enlarged:
        yield "enlarged", f"{pluralize(len(enlarged), 'image')} before cropping, such as {enlarged[0].picture.name}"


def _prompt_facts(samples: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    captioned = sum(bool(captions_of(sample.concept, sample.picture)) for sample in samples)
    prompts = Counter(prompt for sample in samples for prompt in sample.prompt_builder.prompts())
    first = next(iter(prompts))
    yield (
        "captions",
        f"{captioned} of {pluralize(len(samples), 'image')}; {pluralize(len(prompts), 'prompt')}, such as: "
        f"{shorten(first)}",
    )


def _objective_kind(name: str, concepts: ConceptImages) -> ObjectiveKind:
    """Return the objective of that name; for an empty one, the one that fits the prior preservation of the concepts."""
    priors = [prior for concept, _ in concepts if (prior := concept.prior_preservation) is not None]
    by_prediction = any(prior.by == "prediction" for prior in priors)
    return objectives()[name or default_objective(bool(priors) and not by_prediction, by_prediction)]


def _triggers(concepts: ConceptImages) -> list[str]:
    return list(dict.fromkeys(concept.trigger for concept, _ in concepts if concept.trigger))


def _class_image_facts(concepts: ConceptImages) -> Iterator[tuple[str, str]]:
    for concept, pictures in concepts:
        if (prior := concept.prior_preservation) is None:
            continue
        if prior.by == "prediction":
            prompts = list(dict.fromkeys(concept.class_variants(concept.class_text(None))))
            others = f" and {pluralize(len(prompts) - 1, 'other prompt')}" if len(prompts) > 1 else ""
            yield "class", f"preserved by the frozen base's own prediction for: {shorten(prompts[0])}{others}"
        elif prior.folder:
            yield "class", f"images of {prior.folder}"
        else:
            captions = [caption for picture in pictures for caption in captions_of(concept, picture) or (None,)]
            prompts = concept.class_prompts(captions)
            count = f"{pluralize(prior.images, 'image')}, generated unless cached"
            yield "class", f"{count}, of {pluralize(len(prompts), 'prompt')}, such as: {shorten(prompts[0])}"


def _epochs(optim: OptimSettings, samples: Sequence[Sample]) -> str:
    epoch_size = sum(sample.concept.repeats for sample in samples)
    step_size = optim.batch * optim.accumulate
    epochs = optim.steps * step_size / epoch_size
    count = f"{epochs:,.1f}".removesuffix(".0")
    name = "epoch" if epochs == 1 else "epochs"
    return f"{optim.steps}, of {pluralize(step_size, 'image')} each: {count} {name} of {epoch_size}"


def _cost_facts(
    steps: int, base: Base, estimate: Cost, concepts: ConceptImages, device: torch.device
) -> Iterator[tuple[str, str]]:
    yield "trained", f"{estimate.trained:,} parameters; a file of about {format_bytes(estimate.file)}"
    shares = {
        "frozen weights": estimate.weights,
        "trainable parameters": estimate.training,
        "activations": estimate.activations,
    }
    listed = ", ".join(f"{format_bytes(count)} of {name}" for name, count in shares.items())
    yield "memory", f"about {format_bytes(estimate.memory)} on each device: {listed}"
    if estimate.waiting:
        yield "swapped", f"{format_bytes(estimate.waiting)} of frozen weights wait in main memory, for each device"
    rate = denoiser_speed(base, device)
    priors = [prior for concept, _ in concepts if (prior := concept.prior_preservation) is not None]
    generated = sum(prior.images for prior in priors if prior.by == "pictures" and not prior.folder)
    drawn = sum(DRAWN for _, pictures in concepts if not pictures)
    text = f"about {_format_seconds(steps * estimate.step / rate)} for the steps"
    for count, what in ((generated, "class images"), (drawn, "the pictures that the base draws")):
        if count:
            text += f", {_format_seconds(count * _GENERATION_PASSES * estimate.image / rate)} for {what}"
    if rate < _BUSY:
        text += "; a rough figure, as this machine seems to be busy"
    yield "time", f"{text} ({device.type}, {rate / 1e9:,.1f} GFLOP/s on a part of this denoiser)"


def _format_seconds(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def plan_run(name: str | Path, settings: dict[str, Any]) -> Plan:
    """Plan of the recipe called `name`, or at that path, with settings as for `train`; `base` may be a loaded base."""
    loaded_base = settings["base"] if isinstance(settings.get("base"), Base) else None
    settings = {**settings, "base": loaded_base.name} if loaded_base else settings
    recipe = recipe_with(name, save_picture_lists(settings))
    check_output(recipe.output, recipe.folders())
    check_trackers(recipe.trackers)  # its messages are clearer than accelerate's
    accelerator = new_accelerator(recipe.runtime, recipe.outputs)
    check_swap_settings(recipe.runtime)
    check_compatible(recipe.runtime, recipe.quantize)
    check_shards(recipe.shard, accelerator)
    return make_plan(recipe, accelerator.device, DTYPES[recipe.precision], loaded_base)
