"""Which layers of a base adapters are attached to, and what kind of network a path lies in."""

from typing import Any

from torch import nn

from diffgraft.bases.registry import layer_endings, part_names, tokenizers

LAYERS = {
    "attention": ("attention",),
    "attention+feedforward": ("attention", "feedforward"),
    "all": ("attention", "feedforward", "convolution"),
}
"""Name of a choice of layers → the groups of `Family.layers` that it takes"""


def parts_of(target: Any) -> dict[str, nn.Module]:
    """The networks of a base, a pipeline, or anything that has them as attributes, such as `.unet`."""
    found = {name: getattr(target, name, None) for name in part_names()}
    return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


def is_of_text(path: str) -> bool:
    """Whether a module's path, with its part, lies in a text encoder."""
    return path.partition(".")[0] in tokenizers()


def is_embedding(path: str) -> bool:
    """Whether the module at `path` is a text encoder's table of words or positions, whose rows are looked up."""
    return is_of_text(path) and ".embeddings." in path


def choose_layers(part: str, module: nn.Module, layers: str) -> list[str]:
    """Paths inside the network `module`, called `part`, of the layers that a key of `LAYERS` stands for."""
    return find_modules(module, tuple(ending for group in LAYERS[layers] for ending in layer_endings(part, group)))


def find_modules(root: nn.Module, endings: tuple[str, ...]) -> list[str]:
    """Paths of the linear and convolution layers inside `root` whose path ends in one of `endings`."""
    kinds = (nn.Linear, nn.Conv2d)
    return [
        path
        for path, module in root.named_modules()
        if isinstance(module, kinds) and any(path == end or path.endswith("." + end) for end in endings)
    ]
