"""Choosing the layers of a base that adapters are attached to."""

import re
from typing import Any

from torch import nn

from diffgraft.bases.family import Family
from diffgraft.bases.registry import layer_name_suffixes, part_names, tokenizers

LAYERS = {
    "context": ("context",),
    "attention": ("attention",),
    "attention+feedforward": ("attention", "feedforward"),
    "all": ("attention", "feedforward", "convolution", "modulation"),
}
"""Name of a choice of layers → groups of `Family.layers`"""


def parts_of(target: Any) -> dict[str, nn.Module]:
    """Return the networks of a base, a pipeline, or any object that has them as attributes, such as `.unet`."""
    candidates = {name: getattr(target, name, None) for name in part_names()}
    return {name: part for name, part in candidates.items() if isinstance(part, nn.Module)}


def is_of_text(path: str) -> bool:
    """Whether a module path, such as ``text_encoder.encoder.layers.0``, is inside a text encoder."""
    return path.partition(".")[0] in tokenizers()


def is_embedding(path: str) -> bool:
    """Whether the module at `path` is an embedding table of tokens or positions in a text encoder."""
    return is_of_text(path) and ".embeddings." in path


def choose_layers(part: str, module: nn.Module, layers: str, family: Family | None = None) -> list[str]:
    """Return the paths, inside a network, of the layers chosen by a key of `LAYERS`.

    Args:
        part: name of the network.
        module: the network.
        layers: a key of `LAYERS`.
        family: family of its base; None: the network may be of any family that has a network of this name.
    """
    groups = LAYERS[layers]
    if family is None:
        endings = [ending for group in groups for ending in layer_name_suffixes(part, group)]
    else:
        endings = [ending for group in groups for ending in family.layers.get(part, {}).get(group, ())]
    return find_modules(module, tuple(endings))


def find_modules(root: nn.Module, endings: tuple[str, ...]) -> list[str]:
    """Return the paths of linear and convolution layers inside `root` that end in one of `endings`.

    In an ending, ``*`` stands for one step of a path, such as the number of a block.
    """
    kinds = (nn.Linear, nn.Conv2d)
    any_ending = "|".join(re.escape(ending).replace(r"\*", r"[^.]+") for ending in endings)
    pattern = re.compile(rf"(?:.+\.)?(?:{any_ending})")
    return [path for path, module in root.named_modules() if isinstance(module, kinds) and pattern.fullmatch(path)]
