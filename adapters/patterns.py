"""Which modules a person means: by part of the base, by block of the UNet, or by a pattern.

A key is a part (`unet`, `text_encoder` and so on), a block by the names of `strengths` (`BASE`, `IN00`, `M00`,
`OUT00` and so on), a module's path with its part, or a pattern of any of these, in which `*` stands for anything:
``OUT*``, ``unet.mid_block.*``, ``*.attn2.*``. `text_encoder` is all text encoders, but for those that are keys
themselves. Of several keys that mean one module the last counts, so that ``{"*": 0, "OUT*": 1}`` is the way up alone.
"""

import difflib
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from diffgraft.adapters.strengths import block_of
from diffgraft.bases.registry import tokenizers
from diffgraft.errors import DiffgraftError, did_you_mean

T = TypeVar("T")


def chosen(values: Mapping[str, T], path: str, otherwise: T) -> T:
    """The value of the last key that means the module at an adapter's `path`."""
    return next((value for key, value in reversed([*values.items()]) if _means(key, path, values)), otherwise)


def check_keys(setting: str, keys: Collection[str], paths: Collection[str]) -> None:
    """See that each key of a setting means one of `paths`.

    Raises:
        DiffgraftError: one means none of them; the nearest that does is named.
    """
    for key in keys:
        if not any(_means(key, path, keys) for path in paths):
            raise DiffgraftError(f"{setting}.{key} is for nothing that is trained here: {_hint(key, paths)}")


def _means(key: str, path: str, keys: Collection[str]) -> bool:
    part = path.partition(".")[0]
    first, *further = tokenizers()
    if key == first and part in further:  # of several text encoders, all are meant
        return part not in keys
    return any(fnmatchcase(name, key) for name in (part, block_of(path), path))


def _hint(key: str, paths: Collection[str]) -> str:
    names = {name for path in paths for name in (path.partition(".")[0], block_of(path))}
    if key.startswith("text_encoder") and not any(name.startswith("text_encoder") for name in names):
        return "no text encoder is. Most methods train those that there are under text_encoder=true."
    guesses: set[str] = set()
    if any(sign in key for sign in ".*?["):
        for path in paths:
            words = path.split(".")
            guesses |= {path, f"*.{words[-1]}", *(f"*.{word}.*" for word in words[1:-1])}
            guesses |= {f"{'.'.join(words[:count])}.*" for count in range(1, len(words))}
    return did_you_mean(key, difflib.get_close_matches(key, sorted(guesses), 1, 0.5) or names)
