"""Files of a base's weights on disk, and their dtypes."""

import re
from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from diffgraft.bases.configs import read_object
from diffgraft.bases.layout_names import is_transformer
from diffgraft.bases.ldm_keys import UNET_PREFIX
from diffgraft.bases.modular import INDEXES
from diffgraft.errors import DiffgraftError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOAT_DTYPES = (*DTYPES, "F8_E4M3", "F8_E5M2")
"""Names in safetensors of the dtypes that weights on disk may have"""

_OF_LAYER = re.compile(r"(?<!\.lora_down)(?<!\.lora_up)(?<!\.lora_mid)(?<!\.lora_A)(?<!\.lora_B)\.(weight|bias)$")
"""Ending of the name of a layer's own weight or bias, not of an adapter's"""
_MAX_INDEX = 2**26
"""Bytes of an index of shards at most"""


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a whole base: a diffusers folder, a single file, or the single file of its transformer."""
    if path.is_dir():
        return any((path / name).is_file() for name in INDEXES)
    if path.suffix == ".gguf" and path.is_file():
        return True
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            names = [*file.keys()]
            return any(map(is_checkpoint_key, names)) or is_transformer(names)
    except (SafetensorError, OSError):
        return False


def is_checkpoint_key(key: str) -> bool:
    """Whether a key in a file is that of a base's own weight or bias; keys of adapters may have the same prefix."""
    return key.startswith(UNET_PREFIX) and _OF_LAYER.search(key) is not None


def files_of_part(folder: Path) -> list[Path]:
    """Return the weight files in the folder of a network: those of its index, else the default one, else the fp16 one.

    Raises:
        DiffgraftError: the index cannot be read, or names a file that is missing.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        weight_map = read_object(index, _MAX_INDEX).get("weight_map")
        is_valid = isinstance(weight_map, dict) and all(map(_is_file_name, weight_map.values()))
        names = set(weight_map.values()) if isinstance(weight_map, dict) and is_valid else set()
        if not names:
            raise DiffgraftError(f"{index} has no weight_map from weights to the files beside it; copy it again.")
        files = [folder / name for name in sorted(names)]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise DiffgraftError(f"{index} names {missing[0].name}, which is missing: copy the model's folder again.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    default = [path for path in files if path.stem in ("diffusion_pytorch_model", "model")]
    half = [path for path in files if path.stem.endswith(".fp16")]
    return (default or half or files)[:1]


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\\" not in name


def main_dtype(files: Iterable[Path], prefix: str = "") -> torch.dtype | None:
    """Return the dtype of most numbers in the tensors whose names begin with `prefix`; None if there are none.

    Only headers are read.
    """
    counts: Counter[str] = Counter()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    if key.startswith(prefix):
                        tensor = file.get_slice(key)
                        counts[tensor.get_dtype()] += prod(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise DiffgraftError(f"{path} is not a readable .safetensors file ({error}); copy it again.") from error
    return next((DTYPES[name] for name, _ in counts.most_common() if name in DTYPES), None)
