"""Adapter files by name: a folder in which sessions find what a prompt names, each file read once."""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.errors import DiffgraftError, did_you_mean

_SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt")
_OF_RUNS = "adapter"
"""Stem of the adapter file of a run, which is found by the name of the run's folder"""
_BLOCK = 1 << 20
_NO_LIBRARY = "give the folder of adapters (library), or the path of its file."


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter and the hash of the file that it was read from, as the file may change later."""

    adapter: Adapter
    hash: str


class AdapterLibrary:
    """A folder of adapter files, and what was read of it."""

    def __init__(self, folder: str | Path | None, layers_per_block: int | None = None) -> None:
        """Prepare a library.

        Args:
            folder: folder in which files are found by name, in its folders too; None: only paths are known.
            layers_per_block: number of layers in a block of the denoiser, on which names in some files depend.
        """
        self.names: dict[str, Path] = {}
        """Names that stand for files, before those of the folder"""
        self.takes_paths = True
        """Whether names may be paths; not where they come from somebody else's picture"""
        self._folder = None if folder is None else Path(folder).expanduser()
        self._layers_per_block = layers_per_block
        self._loaded: dict[tuple[Path, int, int], LoadedAdapter] = {}
        self._hashes: dict[tuple[Path, int, int], str] = {}

    def load(self, name: str) -> LoadedAdapter:
        """Read an adapter by path, or by name from the folder; the same file is read once.

        Raises:
            DiffgraftError: there is none, or it cannot be read.
        """
        path = self.find(name)
        key = _state(path)
        if key not in self._loaded:
            self._loaded[key] = LoadedAdapter(load_adapter(path, self._layers_per_block), self.hash_of(path))
        return self._loaded[key]

    def find(self, name: str) -> Path:
        """Return the path of an adapter.

        Raises:
            DiffgraftError: there is none of this name, or there are several.
        """
        if name in self.names:
            return self.names[name]
        if self.takes_paths and (path := as_path(name)) is not None:
            return path
        found = self._by_name()
        files = found.get(name, [])
        if len(files) > 1:
            assert self._folder is not None
            whole = [file.relative_to(self._folder).with_suffix("").as_posix() for file in files]
            raise DiffgraftError(f"{name} is the name of {len(files)} adapters: write one of {', '.join(whole[:5])}.")
        if files:
            return files[0]
        where = f" in {self._folder}" if self._folder is not None else ""
        known = {usual_name(str(file)) for files in found.values() for file in files}
        hint = did_you_mean(name, known) if known else _NO_LIBRARY
        raise DiffgraftError(f"There is no adapter {name!r}{where}: {hint}")

    def hash_of(self, path: Path) -> str:
        """Return `content_hash` of an adapter's file, or of that of a run; empty for folders of other kinds."""
        path = path / f"{_OF_RUNS}.safetensors" if path.is_dir() else path
        if not path.is_file():
            return ""
        key = _state(path)
        if key not in self._hashes:
            self._hashes[key] = content_hash(path)
        return self._hashes[key]

    def with_hash(self, start: str) -> Path | None:
        """Return the file of the folder whose hash starts with some digits, whatever its name."""
        return next((file for file in self._files() if self.hash_of(file).startswith(start)), None)

    def _by_name(self) -> dict[str, list[Path]]:
        """Return name → files, with and without folder and suffix; a run's file has the name of its folder."""
        found: dict[str, list[Path]] = {}
        for file in self._files():
            assert self._folder is not None
            inside = file.relative_to(self._folder)
            names = [inside.as_posix(), inside.with_suffix("").as_posix(), file.name, file.stem]
            if file.stem == _OF_RUNS and inside.parent.name:
                names += [inside.parent.as_posix(), inside.parent.name]
            for name in dict.fromkeys(names):
                found.setdefault(name, []).append(file)
        return found

    def _files(self) -> list[Path]:
        """Return the adapter files of the folder; those of a run's checkpoints are none."""
        if self._folder is None:
            return []
        files = (file for file in sorted(self._folder.rglob("*")) if file.suffix in _SUFFIXES and file.is_file())
        return [file for file in files if "checkpoints" not in file.relative_to(self._folder).parts[:-1]]


def as_path(name: str) -> Path | None:
    """Return the path of a file or folder that exists, None if a name is none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user's home, or a zero in it
        return None


def usual_name(source: str) -> str:
    """Return the display name of an adapter that is given by path or by library name.

    That is the file's name without suffix; for the file of a run, the name of the run's folder.
    """
    path = as_path(source)
    if path is None:
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
            end = 8 + struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            file.seek(end if end <= path.stat().st_size else 0)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _state(path: Path) -> tuple[Path, int, int]:
    state = path.stat()
    return path, state.st_mtime_ns, state.st_size
