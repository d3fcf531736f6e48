"""What lies in a file: tensors by name and a header of strings, whether it is safetensors or a pickle of PyTorch's.

A pickle is never trusted: it is opened with ``weights_only=True``, which builds tensors and plain containers and calls
nothing else, and what it claims to hold may not be more than the file is long. Its nested containers become names with
dots, and its numbers and texts entries of the header, as JSON.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffgraft.adapters.formats import float8, pickles
from diffgraft.errors import DiffgraftError, one_line

STEM = "file_stem"
"""Header entry with the file's name without its ending; some tools take it for the word that the file teaches."""
_DEEPEST = 8
_MOST_AXES = 6
"""Convolutions have four, in video models five"""
_NUMBER = ".alpha"
"""End of the keys whose tensors are single numbers, which some tools pickle as plain numbers"""
_ADVICE = "It may have been cut off or be of another kind; download or export it again."


def open_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, which are copies, and header of the file at `path`.

    Raises:
        DiffgraftError: it is missing, damaged, of neither kind, or holds what no file of weights should.
    """
    if not path.is_file():
        there = f"{path} is a folder; name the file in it" if path.is_dir() else f"there is no file {path}"
        raise DiffgraftError(f"No adapter was loaded: {there}.")
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix != ".safetensors" and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        tensors, header = _pickled(path)
    else:
        tensors, header = _safetensors(path)
    for key, value in tensors.items():
        is_number = value.numel() == 1 or key.endswith(
            ("_indices", "_size")
        )  # such as an alpha, or places in a sparse remainder
        is_number &= value.dtype is not torch.bool
        if value.is_complex() or not (value.is_floating_point() or is_number):
            raise DiffgraftError(
                f"{path} holds {one_line(key, 100)} as {str(value.dtype).removeprefix('torch.')}; adapters are made of "
                "floating-point numbers. It is of another kind, or was damaged: download or export it again."
            )
        if value.ndim > _MOST_AXES:
            raise DiffgraftError(
                f"{path} holds {one_line(key, 100)} with {value.ndim} axes; at most {_MOST_AXES}. {_ADVICE}"
            )
    # PyTorch computes with no numbers of eight bits; float32 holds all of them
    wide = {key: value.float() if _is_fp8(value) else value for key, value in tensors.items()}
    return wide, {STEM: path.stem, **header}


def _is_fp8(value: Tensor) -> bool:
    return value.is_floating_point() and value.itemsize == 1


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                if len(file.get_slice(key).get_shape()) > _MOST_AXES:
                    raise ValueError(f"{one_line(key, 100)} has more than {_MOST_AXES} axes")
            # copies: what safetensors hands out is a view of the file, and changes with it
            held = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (not a mapping)
            return float8.widened(held), header
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DiffgraftError(f"{path} is not a readable .safetensors file ({one_line(error)}). {_ADVICE}") from error


def _pickled(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = path.stat().st_size
    try:
        held = pickles.load(path)
        tensors: dict[str, Tensor] = {}
        header: dict[str, str] = {}
        _lay_flat(held, "", tensors, header, _DEEPEST, [size])
        return float8.widened(_copied(tensors, size)), header
    except (pickles.StrangePickleError, pickle.UnpicklingError) as error:
        if not isinstance(error, pickles.StrangePickleError) and "weights_only" not in str(error):
            raise DiffgraftError(f"{path} was not opened as a file of PyTorch's. {_ADVICE}") from error
        raise DiffgraftError(
            f"{path} holds more than tensors, numbers and texts, which may be code that runs on opening: it was not "
            "opened. Get it as .safetensors, from someone you trust."
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        raise DiffgraftError(f"{path} was not opened as a file of PyTorch's ({one_line(error)}). {_ADVICE}") from error


def _copied(tensors: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Copies of tensors from a file of `size` bytes; where one stands there under several names, a single copy."""
    copies: dict[object, Tensor] = {}
    found: dict[str, Tensor] = {}
    left = size
    for key, value in tensors.items():
        place = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if place not in copies:
            left -= value.numel() * value.element_size()
            if left < 0:
                raise ValueError("it claims to hold more than it is long")
            copies[place] = value.detach().clone()
        found[key] = copies[place]
    return found


def _lay_flat(
    held: Any, name: str, tensors: dict[str, Tensor], header: dict[str, str], deeper: int, room: list[int]
) -> None:
    """Put what `held` consists of into `tensors` and `header`, under names that begin with `name`.

    The one number in `room` is how many bytes may still come of it: a pickle can hold one list a billion times.
    """
    room[0] -= len(held) if isinstance(held, str) else 1
    if room[0] < 0:
        raise ValueError("it claims to hold more than it is long")
    if isinstance(held, pickles.ParameterDict):
        held = vars(held).get("_parameters")
    if isinstance(held, Tensor):
        if held.layout != torch.strided or held.is_quantized or held.device.type != "cpu":
            raise ValueError(f"{name or 'it'} is no plain tensor")
        tensors[name] = held
    elif isinstance(held, dict | list | tuple):
        if deeper == 0:
            raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            _lay_flat(value, f"{name}.{key}" if name else str(key), tensors, header, deeper - 1, room)
    elif name.endswith(_NUMBER) and isinstance(held, int | float) and not isinstance(held, bool):
        tensors[name] = torch.tensor(float(held))
    elif held is None or isinstance(held, str | int | float | bool):
        header[name] = json.dumps(held)
    else:
        raise ValueError(f"{name or 'it'} is a {type(held).__name__}")
