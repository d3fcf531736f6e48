"""The contract of a dialect (the format of adapter files of one tool), with a template for a new one.

A new dialect is one module of `diffgraft.adapters.formats`, or of an outside package that lists it in the entry-point
group ``diffgraft.dialects``. It maps keys to module paths and leaves, and back::

    def recognises(tensors, header):                     # called for every file, in `Dialect.order`
        return any(key.startswith("mine|") for key in tensors)

    def read(tensors, header, layers=None):              # called once, if the file is recognised
        deltas = {}
        for key, value in tensors.items():               # use every key, or raise UnknownKeyError
            _, path, leaf = key.split("|")
            deltas.setdefault(path, {})[leaf] = value
        built = {path: (read_delta("full", leaves, None),) for path, leaves in deltas.items()}
        return Adapter(built, read_metadata(header, method="full"))

    def write(adapter):                                  # → tensors by key, and the header
        if adapter.tokens:                               # raise ValueError for contents that it cannot store
            raise ValueError("these files cannot hold words")
        tensors = {f"mine|{path}|{name}": leaf for path, (delta,) in adapter.deltas.items()
                   for name, leaf in delta.leaves.items()}
        return tensors, write_metadata(adapter)

    DIALECT = Dialect(name="mine", summary="the files of my tool", recognises=recognises, read=read, write=write)

How the functions are called:

- `open` when the path of a folder is loaded; only dialects of folders need it.
- `recognises`, then `read`, when an adapter is loaded. Tensors are copies on the CPU, with the dtypes of the file.
- `write` when an adapter is saved. Its result is read again in memory and compared with the adapter before `store`
  writes it to disk: a writer that drops something raises an error, and no file is left.

``diffgraft convert --to``, loading, the test matrices and the page of formats find the dialect through
`diffgraft.adapters.registry`. The command line's help does not import torch, so `name` and `summary` must be string
literals, passed by keyword.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.files import check_suffix, write_safetensors

Contents = tuple[dict[str, Tensor], dict[str, str]]
"""Contents of a file: tensors by key, and a header of strings"""
Recognises = Callable[[Mapping[str, Tensor], Mapping[str, str]], bool]
Read = Callable[[Mapping[str, Tensor], Mapping[str, str], int | None], Adapter]
Write = Callable[[Adapter], Contents]
Store = Callable[[Path, dict[str, Tensor], dict[str, str]], Path]


def store_safetensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> Path:
    """Write a single safetensors file atomically, and return its path.

    Raises:
        DiffgraftError: `path` does not end in .safetensors.
    """
    check_suffix(path)
    return write_safetensors(path, tensors, header)


def _safetensors_suffix(adapter: Adapter) -> str:  # noqa: ARG001  (the suffix of other dialects depends on it)
    return ".safetensors"


@dataclass(frozen=True)
class Dialect:
    """The format of the adapter files of one tool."""

    name: str
    summary: str
    """One line for help texts: which tool's files they are, and what they hold"""
    order: int = 1000
    """Position in the order in which dialects are asked whether they recognise a file; built-in ones use 10 to 120"""
    recognises: Recognises | None = None
    """``recognises(tensors, header)``: whether they look like this dialect; None if another dialect reads its files"""
    read: Read | None = None
    """``read(tensors, header, layers)`` builds the adapter. `layers` is the number of layers per UNet block, if it is
    known; names that count layers through all blocks need it. Raises ValueError for unknown keys or invalid leaves"""
    write: Write | None = None
    """``write(adapter)`` returns tensors and header; None for read-only dialects. Raises ValueError for contents that
    such files cannot hold"""
    store: Store = store_safetensors
    """``store(path, tensors, header)`` saves the result of `write`. Raises ValueError if the path is unsuitable"""
    open: Callable[[Path], Contents | None] | None = None
    """``open(path)`` returns tensors and header of a folder of files; None if the path is not one of this dialect's"""
    suffix: Callable[[Adapter], str] = _safetensors_suffix
    """``suffix(adapter)`` is the file name extension for that adapter, such as ``.safetensors``"""
    auto: int | None = None
    """Position in the order in which the format ``auto`` tries dialects, the most widely read first; None: not tried"""
    is_preferred: Callable[[Adapter], bool] | None = None
    """``is_preferred(adapter)``: whether ``auto`` tries this dialect before all others"""
    holds_new_weights: bool = False
    """Whether the files hold new weights of layers, and not differences; `convert` then needs the base's weights"""
    holds_networks: bool = False
    """Whether the files can hold networks, such as hypernetworks"""
    keeps_metadata: bool = True
    """Whether the files hold all of an adapter's metadata"""
    note: str = ""
    """A sentence for people who convert to this dialect: which programs do not read such files"""

    @property
    def is_safetensors(self) -> bool:
        """Whether every adapter becomes one `.safetensors` file, as the adapter of a training run must be."""
        return self.suffix is _safetensors_suffix
