"""Pickles of PyTorch's, looked through before they are opened: a small file must not take much memory.

``weights_only=True`` runs no code, but it does make what a pickle asks for: gigabytes of zeros by a number of a few
bytes, or what stands in another table of contents than the one that was checked. So the instructions are read first,
and only what files of weights consist of is let through.
"""

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch

_DICTIONARY = "torch.nn.modules.container ParameterDict"
"""The one class that is known, in which the first words of textual inversion lie"""
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
    _DICTIONARY,
}
"""What files of weights name"""
_LARGE = 2**25
"""What numbers beyond the file's length may come to in all: counts of steps, and no sizes"""
_MOST_PICKLES = 5
"""What a file of the older format begins with: a sign, a version, sizes of types, what is held, and the storages"""
_SIGN = 0x1950A86A20F9469CFC6C


class ParameterDict:
    """What stands in for PyTorch's ``ParameterDict``: its pickled attributes, without any method of the real class."""


class StrangePickleError(ValueError):
    """It names something that no file of weights consists of."""


def load(path: Path) -> Any:
    """What a file of PyTorch's holds.

    Raises:
        StrangePickleError: it names functions or classes that may be code.
        Exception: it is damaged, or claims to hold more than it is long; of many kinds.
    """
    content = path.read_bytes()
    if content[:4] == b"PK\x03\x04":
        return _loaded(_packed_again(content))
    stream = io.BytesIO(content)
    for number in range(_MOST_PICKLES):
        if len(content) - stream.tell() < 2 or content[stream.tell()] != 0x80:
            break  # the storages begin; where there is no sign the first is all there is
        _check(stream, len(content), is_sign=number == 0)
    return _loaded(content)


def _loaded(content: bytes) -> Any:
    with torch.serialization.safe_globals([(ParameterDict, _DICTIONARY.replace(" ", "."))]):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _packed_again(content: bytes) -> bytes:
    """The same archive with what its one table of contents lists, and nothing else.

    PyTorch reads archives by itself: of a file with two tables it could take the one that was not looked at.
    """
    again = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(again, "w", zipfile.ZIP_STORED) as clean:
        entries = archive.infolist()
        names = [item.filename for item in entries]
        if any(item.compress_type != zipfile.ZIP_STORED for item in entries):
            raise ValueError("it is compressed, which files of PyTorch are not")
        if sum(item.file_size for item in entries) > len(content) or len(set(names)) < len(names):
            raise ValueError("it claims to hold more than it is long")
        pickles = [item for item in entries if item.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or sum(name.endswith(".pkl") for name in names) != 1:
            raise ValueError("it has no data.pkl of its own")
        for item in entries:
            held = archive.read(item)
            if item is pickles[0]:
                _check(io.BytesIO(held), len(content))
            clean.writestr(zipfile.ZipInfo(item.filename), held)
    return again.getvalue()


def _check(stream: io.BytesIO, size: int, *, is_sign: bool = False) -> None:
    """Read the instructions of one pickle in a file of `size` bytes, and leave the stream behind it."""
    large, names = 0, set[str]()
    texts: list[str] = []
    for instruction, argument, _ in pickletools.genops(stream):
        name = instruction.name
        if name in ("GLOBAL", "INST"):
            names.add(_checked(str(argument)))
        elif name == "STACK_GLOBAL":
            names.add(_checked(" ".join(texts[-2:])))
        elif name == "NEWOBJ" and _DICTIONARY in names:
            continue
        elif name in ("NEWOBJ", "NEWOBJ_EX", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID"):
            raise StrangePickleError(f"it has the instruction {name}")
        elif isinstance(argument, str):
            texts.append(argument)
        elif isinstance(argument, int) and not name.endswith(("PUT", "GET")) and name not in ("FRAME", "PROTO"):
            if is_sign and argument == _SIGN:
                continue
            large += abs(argument) if abs(argument) > size else 0
            if large > _LARGE:
                raise ValueError("it claims to hold more than it is long")


def _checked(name: str) -> str:
    """`name` again. Raises ValueError where it is none of `_KNOWN`."""
    if name not in _KNOWN and name.startswith("torch"):
        raise ValueError(f"{name.replace(' ', '.')[:60]} is no plain tensor")
    if name not in _KNOWN:
        raise StrangePickleError(f"it names {name.replace(' ', '.')[:60]}")
    return name
