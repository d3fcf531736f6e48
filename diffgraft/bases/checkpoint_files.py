"""How the weights of a base lie on disk: in which files, and in which precision."""

import re
from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from diffgraft.bases.configs import read_object
from diffgraft.bases.ldm_keys import UNET_PREFIX
from diffgraft.errors import DiffgraftError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOAT_DTYPES = (*_DTYPES, "F8_E4M3", "F8_E5M2")
"""What safetensors calls the precisions in which a base may lie on disk"""
"""What safetensors calls them; whatever else there is in a file (numbers of positions) decides nothing"""

_OF_LAYER = re.compile(r"(?<!\.lora_down)(?<!\.lora_up)(?<!\.lora_mid)(?<!\.lora_A)(?<!\.lora_B)\.(weight|bias)$")
"""The end of a layer's own parameters"""
_LARGEST_TABLE = 2**26
"""Bytes of a table of shards"""


def is_checkpoint(path: Path) -> bool:
    """Whether a whole base lies there: a diffusers folder, or a single file in the original layout."""
    if path.is_dir():
        return (path / "model_index.json").is_file()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return any(map(is_checkpoint_key, file.keys()))
    except (SafetensorError, OSError):
        return False


def is_checkpoint_key(key: str) -> bool:
    """Whether a key is that of a layer's own weight or bias in a single file; adapters may begin so as well."""
    return key.startswith(UNET_PREFIX) and _OF_LAYER.search(key) is not None


def files_of_part(folder: Path) -> list[Path]:
    """The files of one part: those of its index, else the one without a variant, else the one of half precision.

    Raises:
        DiffgraftError: there is an index that cannot be read, or names a file that is not beside it.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        table = read_object(index, _LARGEST_TABLE).get("weight_map")
        names = set(table.values()) if isinstance(table, dict) and all(map(_is_plain, table.values())) else set()
        if not names:
            raise DiffgraftError(f"{index} has no weight_map from weights to the files beside it; copy it again.")
        files = [folder / name for name in sorted(names)]
        lacking = [file for file in files if not file.is_file()]
        if lacking:
            raise DiffgraftError(f"{index} names {lacking[0].name}, which is missing: copy the model's folder again.")
        return files
    found = sorted(folder.glob("*.safetensors"))
    plain = [path for path in found if path.stem in ("diffusion_pytorch_model", "model")]
    half = [path for path in found if path.stem.endswith(".fp16")]
    return (plain or half or found)[:1]


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\\" not in name


def main_dtype(files: Iterable[Path], start: str = "") -> torch.dtype | None:
    """That of most of the numbers whose names begin with `start`; only headers are read. None where there are none."""
    counts: Counter[str] = Counter()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    if key.startswith(start):
                        held = file.get_slice(key)
                        counts[held.get_dtype()] += prod(held.get_shape())
        except (SafetensorError, OSError) as error:
            raise DiffgraftError(f"{path} is not a readable .safetensors file ({error}); copy it again.") from error
    return next((_DTYPES[name] for name, _ in counts.most_common() if name in _DTYPES), None)
