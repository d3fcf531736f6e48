"""From one dialect to another, and how near the new file comes to the old one."""

from dataclasses import dataclass
from pathlib import Path

from diffgraft.adapters.formats import load_adapter, save_adapter
from diffgraft.adapters.lowrank import Size
from diffgraft.adapters.ops.compare import Comparison, compare
from diffgraft.adapters.ops.resize import resize
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError


@dataclass(frozen=True)
class Converted:
    """A file in its new dialect."""

    path: Path
    comparison: Comparison
    """Of the old file and the new one, both read from disk"""
    approximated: bool
    """Whether modules became LoRAs because the dialect cannot hold what they were"""
    tools_differ: bool
    """Whether it holds what tools take differently at strengths other than 1: DoRA"""


def convert(
    source: str | Path,
    path: str | Path,
    dialect: str,
    approximate: Size | None = None,
    weights: Weights | None = None,
    device: str = "cpu",
) -> Converted:
    """Write the adapter at `source` to `path` in `dialect`.

    Args:
        source: a file in any dialect, or a folder of peft's.
        path: of the new file.
        dialect: one of `diffgraft.adapters.formats.WRITTEN`.
        approximate: where the dialect cannot hold the adapter, LoRAs of this size in its place.
        weights: the base, for approximations of methods that are functions of its weights.
        device: where approximations are computed.

    Raises:
        DiffgraftError: the dialect cannot hold the adapter, and no approximation was asked for.
    """
    adapter = load_adapter(source)
    path = Path(path).expanduser()
    new, approximated = adapter, False
    try:
        save_adapter(adapter, path, dialect)
    except DiffgraftError as error:
        if approximate is None:
            hint = " With --rank or --energy it is approximated by LoRAs." if adapter.deltas else ""
            raise DiffgraftError(f"{error}{hint}") from error
        new, approximated = resize(adapter, approximate, weights, device).adapter, True
        save_adapter(new, path, dialect)
    again = load_adapter(path)
    differ = any(delta.follows for deltas in again.deltas.values() for delta in deltas)
    return Converted(path, compare(adapter, again, weights), approximated, differ)
