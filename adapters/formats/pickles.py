"""Safe loading of PyTorch pickles, which are checked before they are opened, so that small files take little memory.

``weights_only=True`` runs no code, but it creates whatever a pickle asks for: gigabytes of zeros from a number of a few
bytes, or contents of another table of contents than the one that was checked. So the instructions are read first, and
only those that files of weights consist of are accepted.
"""

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch

_PARAMETER_DICT = "torch.nn.modules.container ParameterDict"
"""The only accepted class, in which the first textual inversion files store their words"""
_STORAGES = frozenset(
    f"torch {name}Storage"
    for name in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
)
_KNOWN = _STORAGES | {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch.storage UntypedStorage",
    "torch float32",
    "torch float16",
    "torch bfloat16",
    "torch float8_e4m3fn",
    "torch float8_e5m2",
    "__builtin__ set",
    _PARAMETER_DICT,
}
"""Names of functions and classes that occur in files of weights"""
_LARGE = 2**25
"""Maximum sum of numbers larger than the file's length; such numbers are counts of steps, not sizes"""
_MAX_PICKLES = 5
"""Pickles at the start of a file in the older format: magic number, version, sizes of types, contents, storage keys"""
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C


class ParameterDict:
    """Stand-in for PyTorch's ``ParameterDict``: its pickled attributes, without any method of the real class."""


class UnsafePickleError(ValueError):
    """A pickle names a function or class, or uses an instruction, that files of weights do not contain."""


def load_pickle(path: Path) -> Any:
    """Load a file written by `torch.save`, with tensors on the CPU.

    Raises:
        UnsafePickleError: the pickle names functions or classes that may be code.
        Exception: of many types: the file is damaged, or claims to hold more than its length.
    """
    content = path.read_bytes()
    if content[:4] == b"PK\x03\x04":
        return _torch_load(_repack(content))
    stream = io.BytesIO(content)
    for number in range(_MAX_PICKLES):
        if len(content) - stream.tell() < 2 or content[stream.tell()] != 0x80:
            break  # the storages begin here; a file without a magic number has only one pickle
        _check(stream, len(content), may_be_magic=number == 0)
    return _torch_load(content)


def _torch_load(content: bytes) -> Any:
    with torch.serialization.safe_globals([(ParameterDict, _PARAMETER_DICT.replace(" ", "."))]):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _repack(content: bytes) -> bytes:
    """Rewrite a zip archive with only the entries that its table of contents lists.

    PyTorch has its own zip reader, which could use another table of contents than the one that was checked here.
    """
    repacked = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(repacked, "w", zipfile.ZIP_STORED) as clean:
        entries = archive.infolist()
        names = [item.filename for item in entries]
        if any(item.compress_type != zipfile.ZIP_STORED for item in entries):
            raise ValueError("it is compressed, unlike files written by PyTorch")
        if sum(item.file_size for item in entries) > len(content) or len(set(names)) < len(names):
            raise ValueError("it claims to hold more than its length")
        pickles = [item for item in entries if item.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or sum(name.endswith(".pkl") for name in names) != 1:
            raise ValueError("it does not have exactly one data.pkl")
        for item in entries:
            entry = archive.read(item)
            if item is pickles[0]:
                _check(io.BytesIO(entry), len(content))
            clean.writestr(zipfile.ZipInfo(item.filename), entry)
    return repacked.getvalue()


def _check(stream: io.BytesIO, size: int, *, may_be_magic: bool = False) -> None:
    """Check the instructions of one pickle in a file of `size` bytes, and leave the stream behind it.

    Raises:
        UnsafePickleError: the pickle names something that files of weights do not contain.
        ValueError: its numbers are too large for the file.
    """
    large, names = 0, set[str]()
    texts: list[str] = []
    for instruction, argument, _ in pickletools.genops(stream):
        name = instruction.name
        if name in ("GLOBAL", "INST"):
            names.add(_check_name(str(argument)))
        elif name == "STACK_GLOBAL":
            names.add(_check_name(" ".join(texts[-2:])))
        elif name == "NEWOBJ" and _PARAMETER_DICT in names:
            continue
        elif name in ("NEWOBJ", "NEWOBJ_EX", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID"):
            raise UnsafePickleError(f"it has the instruction {name}")
        elif isinstance(argument, str):
            texts.append(argument)
        elif isinstance(argument, int) and not name.endswith(("PUT", "GET")) and name not in ("FRAME", "PROTO"):
            if may_be_magic and argument == _MAGIC_NUMBER:
                continue
            large += abs(argument) if abs(argument) > size else 0
            if large > _LARGE:
                raise ValueError("it claims to hold more than its length")


def _check_name(name: str) -> str:
    """Return `name` if it is in `_KNOWN`. Raises ValueError if it is another one of torch's, else UnsafePickleError."""
    if name not in _KNOWN and name.startswith("torch"):
        raise ValueError(f"it contains a {name.replace(' ', '.')[:60]}; only plain tensors are read")
    if name not in _KNOWN:
        raise UnsafePickleError(f"it names {name.replace(' ', '.')[:60]}")
    return name
