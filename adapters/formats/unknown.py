"""Keys that a dialect has no place for: the known keys nearest to them, and the base that the rest of a file is for."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.ops.effect import fitting

Read = Callable[[Mapping[str, Tensor], Mapping[str, str]], Adapter]
_AT_MOST = 20
"""So many modules with unknown keys are left aside to see what the others fit."""
_TRANSFORMERS = re.compile(
    r"(base_model\.model\.)?(transformer|diffusion_model)\.|lora_(transformer|te3)_"
    r"|(lora_unet|lycoris)_(double|single|joint)_blocks?_"
)
"""What keys of adapters for transformers begin with: Stable Diffusion 3, Flux, and video models."""


class UnknownKeyError(ValueError):
    """`key` is none of the keys that were `expected`.

    Where the known keys begin with one of `begins` and end in one of `endings`, the nearest is named. A beginning ends
    in ``.`` or ``_`` and an ending starts with ``.``; both may hold more of these.
    """

    def __init__(self, key: str, expected: str, begins: Sequence[str] = (), endings: Sequence[str] = ()) -> None:
        self.key = self.module = key
        near = ""
        if begins and endings:
            begin = max(begins, key=lambda word: _like(word, _first(key, word)))
            middle = key.removeprefix(_first(key, begin))
            stems = {ending: begin + middle.removesuffix(_last(middle, ending)) for ending in endings}
            others = (ending for ending, stem in stems.items() if stem + ending != key)
            ending = max(others, key=lambda word: (_like(word, _last(middle, word)), len(word)))
            self.module = stems[ending]
            """What the keys of the module begin with that it may belong to"""
            near = f"; the nearest known key is {self.module}{ending}"
        super().__init__(f"its key {key} is no {expected}{near}")


def _first(key: str, like: str) -> str:
    """As many words of the beginning of `key` as `like` has, whose last sign divides words."""
    words = key.split(like[-1], like.count(like[-1]))
    return key[: len(key) - len(words[-1])] if len(words) > 1 else ""


def _last(key: str, like: str) -> str:
    """As many words of the end of `key` as `like` has, each with the dot before it."""
    words = key.rsplit(".", like.count("."))
    return key[len(words[0]) :]


def _like(one: str, two: str) -> float:
    return SequenceMatcher(None, one, two).ratio()


def made_for(read: Read, tensors: Mapping[str, Tensor], header: Mapping[str, str], error: UnknownKeyError) -> str:
    """A half-sentence on the known bases whose layers the modules without unknown keys fit; empty where none does."""
    left = dict(tensors)
    for _ in range(_AT_MOST):
        left = {
            key: value for key, value in left.items() if key != error.key and not key.startswith(f"{error.module}.")
        }
        try:
            found = fitting(read(left, header).deltas) if left else []
        except UnknownKeyError as another:
            error = another
        except ValueError:
            break
        else:
            return f", and its other modules are those of {', '.join(found)}" if found else ""
    return ""


def is_for_a_transformer(keys: Iterable[str]) -> bool:
    """Whether a file is for a base whose denoiser is a transformer, of which none is known here."""
    return any(_TRANSFORMERS.match(key) for key in keys)
