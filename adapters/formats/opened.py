"""What lies in a file: tensors by name and a header of strings, whether it is safetensors or a pickle of PyTorch's.

A pickle is never trusted: it is opened with ``weights_only=True``, which builds tensors and plain containers and calls
nothing else, and what it claims to hold may not be more than the file is long. Its nested containers become names with
dots, and its numbers and texts entries of the header, as JSON.
"""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffgraft.adapters.formats import float8
from diffgraft.errors import DiffgraftError

STEM = "file_stem"
"""Header entry with the file's name without its ending; some tools take it for the word that the file teaches."""
_DEEPEST = 8
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
    return tensors, {STEM: path.stem, **header}


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # copies: what safetensors hands out is a view of the file, and changes with it
            held = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (not a mapping)
            return float8.widened(held), header
    except (SafetensorError, OSError, ValueError) as error:
        raise DiffgraftError(f"{path} is not a readable .safetensors file ({error}). {_ADVICE}") from error


def _pickled(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(
                    item.compress_type != zipfile.ZIP_STORED or item.file_size > size for item in archive.infolist()
                ):
                    raise ValueError("it is compressed, which files of PyTorch are not")
        held = torch.load(path, map_location="cpu", weights_only=True)
        tensors: dict[str, Tensor] = {}
        header: dict[str, str] = {}
        _lay_flat(held, "", tensors, header, _DEEPEST)
        if sum(value.numel() * value.element_size() for value in tensors.values()) > size:
            raise ValueError("it claims to hold more than it is long")
        return float8.widened({key: value.detach().clone() for key, value in tensors.items()}), header
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error):
            raise DiffgraftError(f"{path} was not opened as a file of PyTorch's. {_ADVICE}") from error
        raise DiffgraftError(
            f"{path} holds more than tensors, numbers and texts, which may be code that runs on opening: it was not "
            "opened. Get it as .safetensors, from someone you trust."
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DiffgraftError(f"{path} was not opened as a file of PyTorch's ({reason}). {_ADVICE}") from error


def _lay_flat(held: Any, name: str, tensors: dict[str, Tensor], header: dict[str, str], deeper: int) -> None:
    """Put what `held` consists of into `tensors` and `header`, under names that begin with `name`."""
    if isinstance(held, Tensor):
        if held.layout != torch.strided or held.is_quantized or held.device.type != "cpu":
            raise ValueError(f"{name or 'it'} is no plain tensor")
        tensors[name] = held
    elif isinstance(held, dict | list | tuple):
        if deeper == 0:
            raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            _lay_flat(value, f"{name}.{key}" if name else str(key), tensors, header, deeper - 1)
    elif held is None or isinstance(held, str | int | float | bool):
        header[name] = json.dumps(held)
    else:
        raise ValueError(f"{name or 'it'} is a {type(held).__name__}")
