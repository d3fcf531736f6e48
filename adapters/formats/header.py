"""What the headers of adapter files have in common: strings, some of which are JSON."""

import json
import math
from collections.abc import Mapping
from typing import Any

from diffgraft.adapters.adapter import Adapter

OURS = "diffgraft"
"""The key under which every file of ours, in any dialect, tells about itself."""


def read_json(header: Mapping[str, str], key: str) -> dict[str, Any]:
    """The JSON object under `key`; empty where there is none. Raises ValueError where it is something else."""
    try:
        value = json.loads(header.get(key, "{}"))
    except ValueError as error:
        raise ValueError(f"its header entry {key!r} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"its header entry {key!r} holds no JSON object")
    return value


def write_ours(adapter: Adapter) -> dict[str, str]:
    """The adapter's metadata as the entry `OURS`."""
    return {OURS: json.dumps(dict(adapter.metadata), sort_keys=True)} if adapter.metadata else {}


def number(alpha: Any) -> float:
    """`alpha` as a float. Raises ValueError where it is no finite number."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"its header gives {alpha!r} as an alpha, which is no number")
    return float(alpha)
