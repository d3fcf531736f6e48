"""The contract of a dialect (the format of adapter files of one tool), with a template for a new one.

A new dialect is one module of `diffgraft.adapters.formats`, or of an outside package that names it in the entry-point
group ``diffgraft.dialects``. It maps keys to module paths and leaves, and back::

    def recognises(tensors, header):                     # called for every file, in the order of `Dialect.order`
        return any(key.startswith("mine|") for key in tensors)

    def read(tensors, header, layers=None):              # called once, for the dialect that recognises the file
        deltas = {}
        for key, value in tensors.items():               # every key is used, or named in an UnknownKeyError
            _, path, leaf = key.split("|")
            deltas.setdefault(path, {})[leaf] = value
        built = {path: (read_delta("full", leaves, None),) for path, leaves in deltas.items()}
        return Adapter(built, read_metadata(header, method="full"))

    def write(adapter):                                  # → tensors by key, and a header of strings
        if adapter.tokens:                               # what it has no place for is a ValueError, never left out
            raise ValueError("it holds words, for which these files have no place")
        tensors = {f"mine|{path}|{name}": leaf for path, (delta,) in adapter.deltas.items()
                   for name, leaf in delta.leaves.items()}
        return tensors, write_ours(adapter)

    DIALECT = Dialect(name="mine", summary="the files of my tool", recognises=recognises, read=read, write=write)

Who calls what, and when:

- `open` when a path is loaded that is not a file of the dialect's own; only dialects of folders need it.
- `recognises`, then `read`, when an adapter is loaded. Tensors are copies on the CPU, as the file holds them.
- `write` when an adapter is saved. What it returns is read again in memory and compared with what was given, before
  `store` writes it to the disk: a writer that leaves something out is an error, and no file is left.

The formats of ``diffgraft convert --to``, loading, the tests' matrices and the page of formats find it through
`diffgraft.adapters.registry`. For the command line's help, which does not import torch, `name` and `summary` are
literals, given by keyword.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.files import check_suffix, write_safetensors

Contents = tuple[dict[str, Tensor], dict[str, str]]
"""What is in a file: tensors by key, and a header of strings"""
Recognises = Callable[[Mapping[str, Tensor], Mapping[str, str]], bool]
Read = Callable[[Mapping[str, Tensor], Mapping[str, str], int | None], Adapter]
Write = Callable[[Adapter], Contents]
Store = Callable[[Path, dict[str, Tensor], dict[str, str]], Path]


def store_safetensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> Path:
    """Write one safetensors file, whole or not at all.

    Raises:
        DiffgraftError: `path` has another ending.
    """
    check_suffix(path)
    return write_safetensors(path, tensors, header)


def _is_safetensors(adapter: Adapter) -> str:  # noqa: ARG001  (other dialects go by the adapter)
    return ".safetensors"


@dataclass(frozen=True)
class Dialect:
    """The format of adapter files of one tool."""

    name: str
    summary: str
    """One line on whose files they are, and what they hold"""
    order: int = 1000
    """Place in the order in which dialects are asked whether they recognise a file; those here have 10 to 120"""
    recognises: Recognises | None = None
    """Whether tensors and header look like this dialect; None for dialects whose files another one reads"""
    read: Read | None = None
    """Tensors, header, and the number of layers in a block of the UNet where that is known (for names that count
    layers through all blocks) → the adapter. Raises ValueError where a key has no place, or leaves do not fit"""
    write: Write | None = None
    """The adapter → tensors and header; None for dialects that are only read. Raises ValueError where it holds what
    such files have no place for"""
    store: Store = store_safetensors
    """Writes what `write` returned to a path. Raises ValueError where the path cannot be one of such files"""
    open: Callable[[Path], Contents | None] | None = None
    """Tensors and header of a path that is more than one file; None where it is not of this dialect"""
    suffix: Callable[[Adapter], str] = _is_safetensors
    """What the name of the file of an adapter ends in"""
    auto: int | None = None
    """Place in the order in which the format ``auto`` tries dialects, the most widely read first; None: not tried"""
    is_preferred: Callable[[Adapter], bool] | None = None
    """For which adapters ``auto`` tries it before all others"""
    holds_networks: bool = False
    """Whether it has a place for networks, such as hypernetworks"""
    keeps_metadata: bool = True
    """Whether all of an adapter's metadata is in the file"""
    note: str = ""
    """A sentence for people who convert to it: which programs do not read such files"""

    @property
    def is_safetensors(self) -> bool:
        """Whether every adapter becomes one `.safetensors` file, as the adapter of a training run must be."""
        return self.suffix is _is_safetensors
