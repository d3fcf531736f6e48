"""Measurements of one training run: losses, drift, and the judge's verdicts on generated pictures."""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor

from benchmarks.learning.shape import shape_score, silhouette
from benchmarks.learning.targets import BACKDROPS, REFERENCES, NewPrompt, Target, known_things, plain_drawings
from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base
from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.judge import LABELS, Judge, load_judge
from diffgraft.generation.graft import graft
from diffgraft.generation.plots import save_image
from diffgraft.generation.session import Session
from diffgraft.pixels import to_tensor
from diffgraft.trainers.hooks.validation_set import ValidationSet, validation_set_from_images
from diffgraft.trainers.loop import TrainingLoop
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.train import train

TRIGGER, NEW_WORD = "sks", "<sks>"
"""Triggers: a rare word that the base knows, and an unknown word for methods that train a word"""
FIRST_SEED = 4_000
"""Seed of the first picture that is generated for each new prompt"""
DRAWINGS = "reference drawings"
"""Title of the verdicts on drawings of the subject, the upper bound of what an adapter can reach"""
PER_BACKDROP = 2
"""Number of pictures that are generated on each plain background"""


@cache
def tiny() -> Base:
    """Return the base `tiny`, which is loaded once per process."""
    return load_base("tiny")


@cache
def judge() -> Judge:
    """Return the judge of `tiny`, which is loaded once per process."""
    return load_judge(TINY / "judge")


@cache
def validation_sets(target: Target) -> tuple[ValidationSet, ValidationSet, list[str]]:
    """Return validation sets of held-out pictures and of class pictures, and the prompts of the latter."""
    class_set, class_prompts = target.class_validation_set(tiny())
    return target.validation_set(tiny()), class_set, class_prompts


@cache
def known_loss() -> float:
    """Return the loss of the base on pictures of things that it knows, on the pixels of the things."""
    pictures, masks, prompts = known_things()
    return validation_set_from_images(tiny(), pictures, masks).loss(tiny(), prompts)


def recipe_and_words(target: Target, method: str) -> tuple[str, str]:
    """Return the recipe for a target and method, and the words for the target in prompts, such as `sks dog`."""
    if method == "textual-inversion" and target.recipe == "subject":
        return "concept", NEW_WORD
    trigger = NEW_WORD if get_method(method).learns_token else TRIGGER
    return target.recipe, f"{trigger} {target.noun}".strip()


def size(adapter: Adapter) -> int:
    """Return the number of values in an adapter, after any reduction of its rank."""
    of_deltas = sum(leaf.numel() for deltas in adapter.deltas.values() for d in deltas for leaf in d.leaves.values())
    of_networks = sum(value.numel() for network in adapter.networks for value in network.tensors.values())
    return (
        of_deltas
        + of_networks
        + sum(rows.numel() for embeddings in adapter.tokens.values() for rows in embeddings.values())
    )


def measure(
    target: Target, method: str, seed: int, settings: Mapping[str, Any], pictures: Path | None = None
) -> dict[str, Any]:
    """Train once and return all figures; generated pictures are saved in the folder `pictures`, if given.

    Losses are held-out losses. `fall` is the reduction of the loss as a share of the loss before training, `gap closed`
    as a share of its excess over the loss on known things, and `gain without trigger` the reduction for prompts without
    the trigger as a share of the reduction with it.
    """
    base = tiny()
    recipe, words = recipe_and_words(target, method)
    held_out_set, class_set, class_prompts = validation_sets(target)
    with_it, without = [text.replace("{it}", words) for text in target.texts], list(target.without)
    # the tokenizer would split the unknown word into pieces: before training, use prompts with the noun alone
    start = without if NEW_WORD in words else with_it
    before, before_without = held_out_set.loss(base, start), held_out_set.loss(base, without)
    class_before = class_set.predict(base, class_prompts)
    with tempfile.TemporaryDirectory() as folder:
        more = {"previews": False, "checkpoint_every": 0, "trigger": words.split(" ")[0]}
        if target.noun:
            more["subject"] = target.noun
        run, seconds = timed(
            recipe, base=base, images=target.learn, seed=seed, output=Path(folder) / "run", method=method,
            **{**more, **settings},
        )  # fmt: skip
        adapter, file_size = run.adapter, run.adapter_file.stat().st_size
    with graft(base, {adapter: 1.0}):
        after, after_without = held_out_set.loss(base, with_it), held_out_set.loss(base, without)
        drift = class_set.prediction_drift(class_before, base, class_prompts)
        drawn = draw_new(base, target, words)
        outlines = outline_figures(target, draw_plain(base, words) if target.cutout else [])
    if pictures is not None:
        save_drawn(drawn, pictures)
    return {
        "parameters": size(adapter),
        "bytes": file_size,
        "processor seconds": seconds,
        "before": before,
        "after": after,
        "fall": 1 - after / before,
        **({"gap closed": (before - after) / (before - known_loss())} if target.cutout else {}),
        "gain without trigger": (before_without - after_without) / (before - after),
        "class drift": drift,
        **verdicts(drawn),
        **outlines,
    }


def timed(recipe: str, **settings: Any) -> tuple[Run, float]:
    """Train, and return the run and the processor seconds of its training loop, without encoding and sampling."""
    spent = 0.0

    def run(loop: TrainingLoop) -> Any:
        nonlocal spent
        start = time.process_time()
        try:
            return take_steps(loop)
        finally:
            spent = time.process_time() - start

    take_steps = TrainingLoop.run
    with patch.object(TrainingLoop, "run", run):
        return train(recipe, **settings), spent


def draw_new(base: Base, target: Target, words: str) -> list[tuple[NewPrompt, list[Image.Image]]]:
    """Generate pictures for the target's new prompts, always with the same seeds."""
    listed = [(prompt, FIRST_SEED + number) for prompt in target.new for number in range(prompt.count)]
    texts = [prompt.text.replace("{it}", words) for prompt, _ in listed]
    images = Session(base).draw_each(texts, [seed for _, seed in listed], phase_title="generating new prompts")
    rest = iter(images)
    return [(prompt, [next(rest) for _ in range(prompt.count)]) for prompt in target.new]


def draw_plain(base: Base, words: str) -> list[Image.Image]:
    """Generate pictures of a subject on plain backgrounds, `PER_BACKDROP` on each, always with the same seeds."""
    texts = [f"a {words} on a plain {colour} background" for colour in BACKDROPS for _ in range(PER_BACKDROP)]
    seeds = list(range(FIRST_SEED, FIRST_SEED + len(texts)))
    return Session(base).draw_each(texts, seeds, phase_title="generating plain pictures")


def outline_figures(target: Target, plain: Sequence[Image.Image]) -> dict[str, float]:
    """Return the mean shape score of pictures on plain backgrounds; nothing for targets without an outline."""
    if target.cutout is None:
        return {}
    return {"shape": statistics.mean(shape_score(silhouette(picture), target.cutout) for picture in plain)}


def save_drawn(drawn: list[tuple[NewPrompt, list[Image.Image]]], folder: Path) -> None:
    """Save generated pictures in a folder, named and sorted by prompt."""
    for place, (prompt, images) in enumerate(drawn):
        for number, image in enumerate(images):
            save_image(image, folder / f"{place}-{prompt.setting}-{number:02d}.png")


def save_new(target: Target, words: str, folder: Path) -> None:
    """Save the pictures that the base without an adapter generates for the new prompts."""
    save_drawn(draw_new(tiny(), target, words), folder)


@torch.no_grad()
def verdicts(drawn: list[tuple[NewPrompt, list[Image.Image]]]) -> dict[str, float]:
    """Judge generated pictures: return shares of them, and their mean similarity to reference pictures.

    `shown` is the share of pictures with features nearer (by cosine) to the mean of references with the subject or
    style than to the mean of references without it. `followed` is the share with the setting of the prompt, by the
    judge's labels. The judge has no labels for pictures in an unknown style; for the style, a picture follows its
    prompt if its features are nearer to the references of that prompt than to those of all other prompts.
    """
    in_style = torch.stack([centre(prompt.having) for prompt, _ in drawn]) if drawn else torch.empty(0)
    shares: dict[str, list[Tensor]] = {"similarity": [], "shown": [], "followed": [], "shown as asked": []}
    for place, (prompt, images) in enumerate(drawn):
        having, lacking = centre(prompt.having), centre(prompt.lacking)
        pictures = to_tensor(images)
        seen = features(pictures)
        shown = (seen @ having > seen @ lacking).float()
        if prompt.thing is None:
            followed = judge()(pictures)["setting"].argmax(1) == LABELS["setting"].index(prompt.setting)
        else:
            followed = (seen @ in_style.T).argmax(1) == place
        followed = followed.float()
        references = features(to_tensor(prompt.having))
        shares["similarity"].append((seen @ references.T).mean(1))
        shares["shown"].append(shown)
        shares["followed"].append(followed)
        shares["shown as asked"].append(shown * followed)
    return {name: float(torch.cat(values).mean()) for name, values in shares.items() if values}


def features(pictures: Tensor) -> Tensor:
    """Return the judge's features of pictures, [n, 128], normalized to length 1."""
    return torch.nn.functional.normalize(torch.relu(judge().features(pictures)), dim=1)


def centre(images: Any) -> Tensor:
    """Return the mean feature of pictures, [128], normalized to length 1."""
    return torch.nn.functional.normalize(features(to_tensor(list(images))).mean(0), dim=0)


def bounds(target: Target) -> dict[str, dict[str, float]]:
    """Return lower and upper bounds of the verdicts: the base without an adapter, and held-out reference drawings."""
    words = target.noun or "flat"
    bare = draw_new(tiny(), target, words)
    bare_plain, drawn_plain = (draw_plain(tiny(), words), plain_drawings(target.cutout)) if target.cutout else ([], [])
    half = REFERENCES // 2
    references = [(replace(prompt, having=prompt.having[:half]), list(prompt.having[half:])) for prompt in target.new]
    return {
        "base without adapter": verdicts(bare) | outline_figures(target, bare_plain),
        DRAWINGS: verdicts(references) | outline_figures(target, drawn_plain),
    }
