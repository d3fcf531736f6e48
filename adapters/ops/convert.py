"""From one dialect to another, and how near the new file comes to the old one."""

from dataclasses import dataclass
from pathlib import Path

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import WRITTEN, load_adapter, save_adapter
from diffgraft.adapters.lowrank import Size
from diffgraft.adapters.ops.compare import Comparison, compare
from diffgraft.adapters.ops.resize import Reduced, resize
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
    dropped: tuple[str, ...]
    """What approximating left away, as no LoRA can hold it: differences of biases and of norms"""
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
        device: where approximations and errors are computed.

    Raises:
        DiffgraftError: the dialect cannot hold the adapter, and no approximation was asked for.
    """
    adapter = load_adapter(source)
    path = Path(path).expanduser()
    if path.exists():
        raise DiffgraftError(f"{path} is there already. Choose another name, or remove it.")
    found: Reduced | None = None
    try:
        save_adapter(adapter, path, dialect)
    except DiffgraftError as error:
        if not _can_be_approximated(adapter, dialect):
            raise
        if approximate is None:
            raise DiffgraftError(f"{error} With --rank or --energy it is approximated by LoRAs.") from error
        found = resize(adapter, approximate, weights, device)
        save_adapter(found.adapter, path, dialect)
    again = load_adapter(path)
    differ = any(delta.follows for deltas in again.deltas.values() for delta in deltas)
    comparison = compare(adapter, again, weights, device)
    return Converted(path, comparison, found is not None, found.dropped if found else (), differ)


def _can_be_approximated(adapter: Adapter, dialect: str) -> bool:
    """Whether LoRAs in the place of its modules may be what the dialect can hold."""
    plain = {"lora_down", "lora_up"}
    others = any(len(own) > 1 or set(own[0].leaves) != plain for own in adapter.deltas.values())
    return others and dialect in WRITTEN and not adapter.networks
