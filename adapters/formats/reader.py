"""Reading of files: tensors by name and a header of strings, from safetensors or from pickles written by PyTorch.

A pickle is never trusted: it is opened with ``weights_only=True``, which builds only tensors and plain containers, and
its contents must not be larger than the file. Nested containers are flattened to names with dots; numbers and texts
become entries of the header, as JSON.
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

FILE_STEM = "file_stem"
"""Header key of the file's name without its extension, which for some tools is the word that the file holds"""
_MAX_DEPTH = 8
_MAX_AXES = 6
"""Maximum number of axes of a tensor; convolutions have four, in video models five"""
_NUMBER_ENDING = ".alpha"
"""Ending of keys with single numbers as tensors, which some tools pickle as plain numbers"""
_ADVICE = "The file may be incomplete or of another kind; download or export it again."


def open_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors (as copies) and the header of the file at `path`.

    Raises:
        DiffgraftError: the file is missing, damaged, of another kind, or holds something other than weights.
    """
    if not path.is_file():
        missing = f"there is no file {path}{_adapters_near(path)}"
        reason = f"{path} is a folder; name the file in it" if path.is_dir() else missing
        if (path / "recipe.yaml").is_file():
            reason = f"the run has not finished; continue it with `diffgraft train --resume {path}`"
        raise DiffgraftError(f"No adapter was loaded: {reason}.")
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix != ".safetensors" and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        tensors, header = _read_pickle(path)
    else:
        tensors, header = _read_safetensors(path)
    for key, value in tensors.items():
        # single numbers are alphas, the others belong to sparse remainders
        is_number = value.numel() == 1 or key.endswith(("_indices", "_size"))
        is_number &= value.dtype is not torch.bool
        if value.is_complex() or not (value.is_floating_point() or is_number):
            raise DiffgraftError(
                f"{path} holds {one_line(key, 100)} as {str(value.dtype).removeprefix('torch.')}; adapters consist of "
                f"floating-point numbers. {_ADVICE}"
            )
        if value.ndim > _MAX_AXES:
            raise DiffgraftError(
                f"{path} holds {one_line(key, 100)} with {value.ndim} axes; at most {_MAX_AXES} are allowed. {_ADVICE}"
            )
    # PyTorch cannot compute with float8; float32 represents all its values
    wide = {key: value.float() if _is_float8(value) else value for key, value in tensors.items()}
    return wide, {FILE_STEM: path.stem, **header}


def _adapters_near(path: Path) -> str:
    """Name adapter files near a missing one, as the end of a sentence about it."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    found = (*folder.glob("*.safetensors"), *folder.glob("*/adapter.safetensors"))
    files = sorted(str(file.relative_to(folder)) for file in found)
    held = ", ".join(files[:3]) + (", …" if len(files) > 3 else "")
    return f"; {folder} holds {held}" if files else f", and no .safetensors file in {folder}"


def _is_float8(value: Tensor) -> bool:
    return value.is_floating_point() and value.itemsize == 1


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                if len(file.get_slice(key).get_shape()) > _MAX_AXES:
                    raise ValueError(f"{one_line(key, 100)} has more than {_MAX_AXES} axes")
            # copies, as safetensors returns views of the file, which change with it
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (not a mapping)
            return float8.upcast(tensors), header
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DiffgraftError(f"{path} is not a readable .safetensors file ({one_line(error)}). {_ADVICE}") from error


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = path.stat().st_size
    try:
        contents = pickles.load_pickle(path)
        tensors: dict[str, Tensor] = {}
        header: dict[str, str] = {}
        _flatten(contents, "", tensors, header, _MAX_DEPTH, [size])
        return float8.upcast(_copy(tensors, size)), header
    except (pickles.UnsafePickleError, pickle.UnpicklingError) as error:
        if not isinstance(error, pickles.UnsafePickleError) and "weights_only" not in str(error):
            raise DiffgraftError(f"{path} is not a readable file of PyTorch's. {_ADVICE}") from error
        raise DiffgraftError(
            f"{path} holds more than tensors, numbers and texts, which may be code that runs on opening, so it was not "
            "opened. Download it as .safetensors, from a source that you trust."
        ) from error
    except Exception as error:  # a damaged pickle can raise any exception
        raise DiffgraftError(f"{path} is not a readable file of PyTorch's ({one_line(error)}). {_ADVICE}") from error


def _copy(tensors: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Copy tensors from a file of `size` bytes; a tensor with several names is copied once."""
    copies: dict[object, Tensor] = {}
    result: dict[str, Tensor] = {}
    remaining = size
    for key, value in tensors.items():
        place = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if place not in copies:
            remaining -= value.numel() * value.element_size()
            if remaining < 0:
                raise ValueError("it claims to hold more than its length")
            copies[place] = value.detach().clone()
        result[key] = copies[place]
    return result


def _flatten(
    value: Any, name: str, tensors: dict[str, Tensor], header: dict[str, str], depth: int, budget: list[int]
) -> None:
    """Add the tensors, numbers and texts inside `value` to `tensors` and `header`, under names that begin with `name`.

    `depth` levels of nesting are allowed. The single number in `budget` is the number of bytes that may still be added,
    as a pickle can contain the same list a billion times.
    """
    budget[0] -= len(value) if isinstance(value, str) else 1
    if budget[0] < 0:
        raise ValueError("it claims to hold more than its length")
    if isinstance(value, pickles.ParameterDict):
        value = vars(value).get("_parameters")
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise ValueError(f"{name or 'it'} is a sparse, quantized or GPU tensor; only plain tensors are read")
        tensors[name] = value
    elif isinstance(value, dict | list | tuple):
        if depth == 0:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _flatten(inner, f"{name}.{key}" if name else str(key), tensors, header, depth - 1, budget)
    elif name.endswith(_NUMBER_ENDING) and isinstance(value, int | float) and not isinstance(value, bool):
        tensors[name] = torch.tensor(float(value))
    elif value is None or isinstance(value, str | int | float | bool):
        header[name] = json.dumps(value)
    else:
        raise ValueError(f"{name or 'it'} is a {type(value).__name__}")
