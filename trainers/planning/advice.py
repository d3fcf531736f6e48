"""What seldom trains well, told before a run: settings far from any that work, pictures that teach something else."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import median

import numpy as np

from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base
from diffgraft.bases.layers import choose_layers
from diffgraft.data.near_duplicates import Fingerprint
from diffgraft.trainers.recipe.groups import AdapterSettings, DataSettings
from diffgraft.trainers.training_data.build import Sample, resolution_of

_TOY = "tiny"
_BEYOND = 2
"""Times a base's own resolution, from which pictures or a resolution are for another base"""
_SAME_BACKDROP = 8.0
"""Of 255, so far apart the edges of pictures are on average where their backdrops are one"""
_FEW = 3
"""So many pictures it takes to say that their backdrops are the same"""


def advice(
    task: str,
    data: DataSettings,
    adapter: AdapterSettings,
    base: Base,
    learnt: Sequence[Sample],
    seen: Sequence[tuple[str, Fingerprint]],
) -> Iterator[str]:
    """One sentence for each thing that a person may want to change.

    Args:
        task: of the recipe.
        data: its pictures and prompts.
        adapter: its method and layers.
        base: or its outline, without weights.
        learnt: the pictures with their words.
        seen: names and fingerprints of pictures.
    """
    yield from _sizes(task, resolution_of(data, base), base, learnt)
    yield from _rank(adapter, base)
    if len(learnt) == 1:
        yield "there is one picture: that picture is learnt, and not what it shows. Three to six are better."
    if task == "style" and not any(one.picture.captions for one in learnt):
        yield (
            "no picture has a caption, so that what the pictures show becomes a part of the style: "
            "`diffgraft caption FOLDER` writes some."
        )
    if not data.trigger.strip() and task != "style":
        yield "the trigger is empty: what is learnt has no word of its own, and comes with every picture of its class."
    yield from _backdrops([one for _, one in seen])


def _sizes(task: str, side: int, base: Base, learnt: Sequence[Sample]) -> Iterator[str]:
    own = base.resolution
    if side >= _BEYOND * own:
        yield f"resolution={side} is {side / own:.0f} times the {own} pixels that this base was made for."
    shown = median(min(one.frames[0].original) for one in learnt)
    if base.name == _TOY and shown > _BEYOND * own:
        yield (
            f"`{_TOY}` is a toy of {own} pixels for trying and tests: photographs become a blur there. For pictures of "
            f"your own name a base, such as base=path/to/stable-diffusion-v1-5, and its recipe, sd15-{task}."
        )


def _rank(adapter: AdapterSettings, base: Base) -> Iterator[str]:
    method = get_method(adapter.method)
    options = method.read_options(adapter.options)
    if "rank" in method.unsupported_under(options):
        return
    layers = choose_layers(base.family.denoiser, base.denoiser, adapter.layers or method.layers_under(options))
    shapes = [base.denoiser.get_submodule(path).weight.shape for path in layers]
    most = max((min(shape[0], shape[1:].numel()) for shape in shapes), default=0)
    if most and adapter.rank > most:
        yield f"rank={adapter.rank} holds no more than rank {most}, the most that any layer here has; 4 to 64 is usual."


def _backdrops(seen: Sequence[Fingerprint]) -> Iterator[str]:
    if len(seen) < _FEW:
        return
    edges = [
        np.concatenate([one.cells[0], one.cells[-1], one.cells[1:-1, 0], one.cells[1:-1, -1]]) for one in seen[:50]
    ]
    apart = [float(np.abs(one - other).mean()) for one, other in combinations(edges, 2)]
    if median(apart) < _SAME_BACKDROP:
        yield (
            "the pictures have nearly the same backdrop, which is learnt along with what they show: pictures in other "
            "places, or masks (`diffgraft mask`), keep it out."
        )
