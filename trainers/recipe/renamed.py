"""Recipe keys that have been renamed: the former ones work for one release, with a warning that names the new key."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from diffgraft.errors import DiffgraftError

_OPTIONS = {
    "up_rate": "loraplus_ratio",
    "word_rate": "token_lr_scale",
    "split_both": "decompose_both",
    "of_weights": "weights_options",
}
RENAMED = {
    "rates": "lr_scale",
    "timesteps.first": "timesteps.min",
    "timesteps.last": "timesteps.max",
    "timesteps.spread": "timesteps.distribution",
    "timesteps.width": "timesteps.std",
    "buckets.least": "buckets.min",
    "buckets.most": "buckets.max",
    **{f"options.{former}": f"options.{current}" for former, current in _OPTIONS.items()},
    **{
        f"options.{outer}.{former}": f"options.{outer}.{current}"
        for outer in ("of_weights", "weights_options")
        for former, current in _OPTIONS.items()
    },
}
"""Former key, nested with dots → current key"""


def current_key(key: str) -> str:
    """Return the current name of a recipe key such as ``rates.unet``; a key that was not renamed is returned as is."""
    parts = key.split(".")
    for place in range(len(parts), 0, -1):
        former = ".".join(parts[:place])
        if former in RENAMED:
            return current_key(".".join([RENAMED[former], *parts[place:]]))
    return key


def with_current_keys(values: Mapping[Any, Any], *, warn: bool = True) -> dict[Any, Any]:
    """Return recipe values in which every renamed key has its current name.

    Args:
        values: nested mappings by key; keys may also be nested with dots (``timesteps.first``).
        warn: whether a warning tells the current name of each former key.

    Raises:
        DiffgraftError: a setting is given twice: under both names, or nested and with dots.
    """
    renamed = _current(values, "", warn)
    seen: set[str] = set()
    for key in _leaves(renamed):
        if key in seen:
            raise DiffgraftError(f"The setting {key} is given twice: keep one of the values.")
        seen.add(key)
    return renamed


def plain_value(value: Any) -> Any:
    """Return a value as it is meant: text, as on a command line, is read as YAML where it is valid."""
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def _leaves(values: Mapping[Any, Any], path: str = "") -> Iterator[str]:
    """Yield the dotted names of all values that are not mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def _current(values: Mapping[Any, Any], path: str, warn: bool) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key, value in values.items():
        former, name = f"{path}{key}", key
        if isinstance(key, str) and (current := current_key(former)) != former:
            # the outer levels were renamed already, so that the new key differs from the former one below `path` alone
            name = current.removeprefix(path)
            if name in values:
                raise DiffgraftError(f"{former} was renamed to {current}, and both are given: keep {current} alone.")
            if warn:
                warnings.warn(f"The setting {former} is now called {current}; use the new name.", stacklevel=5)
        result[name] = _current(value, f"{path}{name}.", warn) if isinstance(value, Mapping) else value
    return result
