"""Selection of modules by keys in recipes: by part of the base, by block of the UNet, or by a pattern.

A key is a part (`unet`, `text_encoder` and so on), a block as named in `strengths` (`BASE`, `IN00`, `M00`, `OUT00` and
so on), a module's path with its part, or a pattern of any of these, in which `*` matches anything: ``OUT*``,
``unet.mid_block.*``, ``*.attn2.*``. `text_encoder` matches all text encoders, except those that are keys themselves.
If several keys match a module, the last one counts: ``{"*": 0, "OUT*": 1}`` selects only the up blocks.
"""

import difflib
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from diffgraft.adapters.strengths import block_of
from diffgraft.bases.registry import tokenizers
from diffgraft.errors import DiffgraftError, did_you_mean

T = TypeVar("T")


def last_matching_value(values: Mapping[str, T], path: str, default: T) -> T:
    """Return the value of the last key that matches the module at `path`, or `default` if no key does.

    A key is a shell pattern of module paths, such as ``*.attn2.*``, or the name of a block, such as ``M00``.
    """
    return next((value for key, value in reversed([*values.items()]) if _matches(key, path, values)), default)


def check_pattern_keys(setting: str, keys: Collection[str], paths: Collection[str]) -> None:
    """Check that each key of a setting matches at least one of `paths`.

    Raises:
        DiffgraftError: a key matches none of them; the message names the nearest key that does.
    """
    for key in keys:
        if not any(_matches(key, path, keys) for path in paths):
            raise DiffgraftError(f"{setting}.{key} matches no trained module: {_hint(key, paths)}")


def _matches(key: str, path: str, keys: Collection[str]) -> bool:
    part = path.partition(".")[0]
    first, *further = tokenizers()
    if key == first and part in further:  # the key `text_encoder` stands for all of them
        return part not in keys
    return any(fnmatchcase(name, key) for name in (part, block_of(path), path))


def _hint(key: str, paths: Collection[str]) -> str:
    names = {name for path in paths for name in (path.partition(".")[0], block_of(path))}
    if key.startswith("text_encoder") and not any(name.startswith("text_encoder") for name in names):
        return "no text encoder is trained. With most methods, text_encoder=true trains them."
    guesses: set[str] = set()
    if any(sign in key for sign in ".*?["):
        for path in paths:
            words = path.split(".")
            guesses |= {path, f"*.{words[-1]}", *(f"*.{word}.*" for word in words[1:-1])}
            guesses |= {f"{'.'.join(words[:count])}.*" for count in range(1, len(words))}
    return did_you_mean(key, difflib.get_close_matches(key, sorted(guesses), 1, 0.5) or names)
