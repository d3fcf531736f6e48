"""Advice before a run: settings that seldom train well, and images that teach something unintended."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import median

import numpy as np

from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base
from diffgraft.bases.layers import choose_layers
from diffgraft.data.near_duplicates import Fingerprint
from diffgraft.trainers.objectives.registry import reads_captions
from diffgraft.trainers.recipe.groups import AdapterSettings, DataSettings
from diffgraft.trainers.training_data.build import Sample, resolution_of

_TOY = "tiny"
_OVERSIZE = 2
"""Multiple of a base's resolution from which images or a recipe's resolution are too large for it"""
_SAME_BACKDROP = 8.0
"""Mean difference of the edges of two images, of 255, below which their backdrops are considered the same"""
_MIN_IMAGES = 3
"""Number of images needed to compare backdrops"""


def advice(
    task: str,
    data: DataSettings,
    adapter: AdapterSettings,
    base: Base,
    samples: Sequence[Sample],
    fingerprints: Sequence[tuple[str, Fingerprint]],
    objective: str = "",
) -> Iterator[str]:
    """Yield a sentence for each thing that the user may want to change.

    Args:
        task: the recipe's task.
        data: its images and prompts.
        adapter: its method and layers.
        base: the base, which may be on the meta device.
        samples: the training images with their prompts.
        fingerprints: names and fingerprints of the images.
        objective: name of the recipe's objective; empty for the default.
    """
    yield from _size_advice(task, resolution_of(data, base), base, samples)
    yield from _rank_advice(adapter, base)
    if len(samples) == 1:
        yield "there is one image: the run will learn that image rather than its subject. Three to six are better."
    if task == "style" and reads_captions(objective) and not any(sample.picture.captions for sample in samples):
        yield (
            "no image has a caption, so that the content of the images becomes part of the style: "
            "write captions with `diffgraft caption FOLDER`."
        )
    if not data.trigger.strip() and task not in ("style", "control"):
        yield "the trigger is empty: without a word of its own, the subject appears in every image of its class."
    if task == "control":
        return
    yield from _backdrop_advice([fingerprint for _, fingerprint in fingerprints])


def _size_advice(task: str, side: int, base: Base, samples: Sequence[Sample]) -> Iterator[str]:
    resolution = base.resolution
    if side >= _OVERSIZE * resolution:
        yield f"resolution={side} is {side / resolution:.0f} times this base's resolution of {resolution} pixels."
    shorter_side = median(min(sample.frames[0].original) for sample in samples)
    if base.name == _TOY and shorter_side > _OVERSIZE * resolution:
        yield (
            f"`{_TOY}` is a toy base of {resolution} pixels for tests, on which photographs become a blur. For your "
            f"own images set a base, such as base=path/to/stable-diffusion-v1-5, and use its recipe, sd15-{task}."
        )


def _rank_advice(adapter: AdapterSettings, base: Base) -> Iterator[str]:
    method = get_method(adapter.method)
    options = method.read_options(adapter.options)
    if "rank" in method.unsupported_under(options):
        return
    kind = adapter.layers or method.layers_under(options)
    layers = choose_layers(base.family.denoiser, base.denoiser, kind, base.family)
    shapes = [base.denoiser.get_submodule(path).weight.shape for path in layers]
    max_rank = max((min(shape[0], shape[1:].numel()) for shape in shapes), default=0)
    if max_rank and adapter.rank > max_rank:
        yield f"rank={adapter.rank} exceeds {max_rank}, the largest rank of any adapted layer; 4 to 64 is usual."


def _backdrop_advice(fingerprints: Sequence[Fingerprint]) -> Iterator[str]:
    if len(fingerprints) < _MIN_IMAGES:
        return
    grids = [fingerprint.cells for fingerprint in fingerprints[:50]]
    edges = [np.concatenate([cells[0], cells[-1], cells[1:-1, 0], cells[1:-1, -1]]) for cells in grids]
    differences = [float(np.abs(a - b).mean()) for a, b in combinations(edges, 2)]
    if median(differences) < _SAME_BACKDROP:
        yield (
            "the images have nearly the same backdrop, which will be learned along with the subject: add images with "
            "other backdrops, or mask the backdrop with `diffgraft mask`."
        )
