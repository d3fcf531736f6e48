"""Adapter files that a run uses beside its pictures: the one that it starts from, and the one under the training."""

import hashlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.bases import Base
from diffgraft.bases.ldm_keys import layers_per_block_of


@dataclass(frozen=True)
class AdapterFile:
    """An adapter, and the file that it was read from."""

    path: Path
    adapter: Adapter
    hash: str
    """SHA-256 of the file's bytes; for a folder, of its files' bytes, concatenated"""
    _warned: set[str] = field(default_factory=set, repr=False)

    def warn_once(self, message: str) -> None:
        """Issue a warning, unless the same one was issued before."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=5)


def read_adapter_file(path: str, base: Base) -> AdapterFile:
    """Load the adapter at `path`: a file, a folder of peft, or the folder of a run.

    `base` decides how the blocks in the adapter's keys are numbered.

    Raises:
        DiffgraftError: there is no file at `path`, or it is not an adapter.
    """
    location = Path(path).expanduser()
    adapter = load_adapter(location, layers_per_block_of(base))
    run_file = location / "adapter.safetensors"
    if run_file.is_file():
        files = [run_file]
    else:
        files = sorted(location.rglob("adapter_*")) if location.is_dir() else [location]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return AdapterFile(location, adapter, digest.hexdigest())


def file_hash(path: str, file: AdapterFile | None) -> str | None:
    """Hash of the adapter file at the `path` in a recipe; empty if the recipe has none, None if it no longer exists."""
    return file.hash if file else None if path else ""
