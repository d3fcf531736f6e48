"""Adapter files by name: a folder in which sessions find what a prompt names, each file read once."""

import hashlib
import struct
from pathlib import Path

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.errors import DiffgraftError, did_you_mean

_SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt")
_OF_RUNS = "adapter"
"""Stem of the adapter file of a run, which is found by the name of the run's folder"""
_BLOCK = 1 << 20


class AdapterLibrary:
    """A folder of adapter files, and what was read of it."""

    def __init__(self, folder: str | Path | None, layers_in_block: int | None = None) -> None:
        """Prepare a library.

        Args:
            folder: folder in which files are found by name, in its folders too; None: only paths are known.
            layers_in_block: number of layers in a block of the denoiser, on which names in some files depend.
        """
        self.names: dict[str, Path] = {}
        """Names that stand for files, before those of the folder"""
        self._folder = None if folder is None else Path(folder).expanduser()
        self._layers_in_block = layers_in_block
        self._loaded: dict[tuple[Path, int, int], Adapter] = {}
        self._hashes: dict[tuple[Path, int, int], str] = {}

    def load(self, name: str) -> Adapter:
        """Read an adapter by path, or by name from the folder; the same file is read once.

        Raises:
            DiffgraftError: there is none, or it cannot be read.
        """
        path = self.find(name)
        key = _state(path)
        if key not in self._loaded:
            self._loaded[key] = load_adapter(path, self._layers_in_block)
        return self._loaded[key]

    def find(self, name: str) -> Path:
        """Return the path of an adapter.

        Raises:
            DiffgraftError: there is none of this name; the message has the nearest.
        """
        path = self.names.get(name) or Path(name).expanduser()
        if path.exists():
            return path
        found: dict[str, Path] = {}
        for file in self._files():
            assert self._folder is not None
            inside = file.relative_to(self._folder)
            run = [inside.parent.as_posix(), inside.parent.name] if file.stem == _OF_RUNS and inside.parent.name else []
            for key in (*run, inside.as_posix(), inside.with_suffix("").as_posix(), file.name, file.stem):
                found.setdefault(key, file)
        if name in found:
            return found[name]
        where = f" in {self._folder}" if self._folder is not None else ""
        hint = (
            did_you_mean(name, {usual_name(str(file)) for file in found.values()})
            if found
            else "give the path of its file."
        )
        raise DiffgraftError(f"There is no adapter {name!r}{where}: {hint}")

    def hash_of(self, name: str) -> str:
        """Return `content_hash` of an adapter's file, or of that of a run; empty for folders of other kinds."""
        path = self.find(name)
        path = path / f"{_OF_RUNS}.safetensors" if path.is_dir() else path
        if not path.is_file():
            return ""
        key = _state(path)
        if key not in self._hashes:
            self._hashes[key] = content_hash(path)
        return self._hashes[key]

    def with_hash(self, wanted: str) -> Path | None:
        """Return the file of the folder that has a hash, whatever its name."""
        for file in self._files():
            if self.hash_of(str(file)) == wanted:
                return file
        return None

    def _files(self) -> list[Path]:
        if self._folder is None:
            return []
        return [file for file in sorted(self._folder.rglob("*")) if file.suffix in _SUFFIXES and file.is_file()]


def usual_name(source: str) -> str:
    """Return the name of an adapter by its path or its name in a library: without suffix, of a run its folder's."""
    path = Path(source)
    if not path.expanduser().exists():
        return source
    return path.absolute().parent.name if path.stem == _OF_RUNS else path.stem


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; of a .safetensors file, of what follows its header.

    The first twelve digits are what webui and Civitai know a LoRA by; a changed header does not change them.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            start = file.read(8)
            file.seek(8 + struct.unpack("<Q", start)[0] if len(start) == 8 else 0)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _state(path: Path) -> tuple[Path, int, int]:
    state = path.stat()
    return path, state.st_mtime_ns, state.st_size
