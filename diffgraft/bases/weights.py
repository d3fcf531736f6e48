"""A base's weights on disk, each read on access, for work that goes from layer to layer.

Names are module paths of adapters with the name of the parameter: ``unet.mid_block.attentions.0.proj_in.weight``,
``text_encoder.encoder.layers.0.self_attn.q_proj.bias``. The VAE is left out.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffgraft.bases.checkpoint_files import files_of_part
from diffgraft.bases.header_config import read_config_overrides
from diffgraft.bases.ldm_keys import MAX_LEVELS, UNET_PREFIX, BlockLayout, clip_names_from_open_clip, is_open_clip
from diffgraft.bases.loading import CONFIGS, TINY
from diffgraft.bases.registry import families, part_names
from diffgraft.bases.transformer_files import TransformerFile, open_transformer
from diffgraft.errors import DiffgraftError

T = TypeVar("T")
_COUNTS = (2, 1, 3, 4)
"""Possible numbers of layers per block of a UNet, the usual one first"""
_LAYER = re.compile(r"unet\.down_blocks\.\d+\.resnets\.(\d+)\.")


class Weights(Mapping[str, Tensor]):
    """A mapping of name → weight in the dtype of its file; a context manager that closes the files at its end."""

    def __init__(self, source: str) -> None:
        """Begin without weights; `source` is the base's name or path."""
        self.source = source
        self._open = ExitStack()
        self._readers: dict[str, Callable[[], Tensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight without reading it."""
        return self._shapes[name]

    @property
    def layers_per_block(self) -> int | None:
        """Layers per block of the UNet; None without a UNet."""
        numbers = [int(match[1]) + 1 for name in self if (match := _LAYER.match(name))]
        return max(numbers, default=None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return module path → shape of its ``weight``, without reading weights."""
        return {name.removesuffix(".weight"): s for name, s in self._shapes.items() if name.endswith(".weight")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def open(self, path: Path) -> Any:
        """Open a safetensors file, which is closed together with this object."""
        try:
            return self._open.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise DiffgraftError(f"{path} is not a readable .safetensors file ({error}).") from error

    def add(self, name: str, file: Any, key: str, third: int | None = None, transposed: bool = False) -> None:
        """Add the tensor under `key` of `file` as the weight `name`.

        Args:
            name: name of the weight.
            file: an open safetensors file.
            key: name of the tensor in the file.
            third: 0, 1 or 2 to take only that third of its rows.
            transposed: whether the weight is the transposed tensor.
        """
        rows, *rest = file.get_slice(key).get_shape() or [1]
        shape = (rows if third is None else rows // 3, *rest)

        def read() -> Tensor:
            if third is not None:
                value: Tensor = file.get_slice(key)[third * rows // 3 : (third + 1) * rows // 3]
            else:
                value = file.get_tensor(key)
            return value.T if transposed else value.clone()

        self._readers[name] = read
        self._shapes[name] = shape[::-1] if transposed else shape

    def add_transformer(self, transformer: TransformerFile) -> None:
        """Add the weights of a transformer's single file, which stays open as long as this object."""
        for name, shape, read in transformer.weights():
            path = f"{transformer.family.denoiser}.{name}"
            self._readers[path], self._shapes[path] = read, shape

    def enter(self, context: AbstractContextManager[T]) -> T:
        """Enter a context that is left together with this object."""
        return self._open.enter_context(context)


def open_weights(source: str | Path) -> Weights:
    """Open the weights of ``tiny``, of a diffusers folder, or of a single file; that of a transformer may be GGUF.

    Raises:
        DiffgraftError: `source` is none of these, or a file cannot be read.
    """
    path = TINY if str(source) == "tiny" else Path(source).expanduser()
    weights = Weights(str(source))
    if path.is_dir():
        for part in part_names():
            for file in files_of_part(path / part):
                opened = weights.open(file)
                for key in opened.keys():  # noqa: SIM118  (not a mapping)
                    weights.add(f"{part}.{key.removeprefix('text_model.')}", opened, key)
    elif path.is_file():
        _add_single_file(weights, path)
    else:
        raise DiffgraftError(
            f"The base {source} was not found: give `tiny`, a diffusers folder or a .safetensors checkpoint."
        )
    if not weights:
        raise DiffgraftError(
            f"{path} has no weights of a base: neither unet/*.safetensors nor names of the original layout."
        )
    return weights


def _add_single_file(weights: Weights, path: Path) -> None:
    if (transformer := weights.enter(open_transformer(path))) is not None:
        weights.add_transformer(transformer)
        return
    file = weights.open(path)
    keys = list(file.keys())
    for key, name in _unet_names(path, [key for key in keys if key.startswith(UNET_PREFIX)]).items():
        weights.add(f"unet.{name}", file, key)
    for family in families().values():
        prefixes = family.single_file_prefixes
        if not prefixes or not all(any(key.startswith(prefix) for key in keys) for prefix in prefixes.values()):
            continue
        for part, prefix in prefixes.items():
            overrides = read_config_overrides(path, file.metadata() or {}).get(part, {})
            layers = overrides.get("num_hidden_layers", _layers(family.name, part))
            for key in keys:
                if key.startswith(prefix):
                    _add_text_weight(weights, file, part, key, prefix, layers)
        return


def _unet_names(path: Path, keys: list[str]) -> dict[str, str]:
    """Return key → diffusers' name, for the first number of layers per block that fits all keys."""
    reason: ValueError | None = None
    for count in _COUNTS:
        blocks = BlockLayout(count, (True,) * MAX_LEVELS)
        try:
            return {key: blocks.to_diffusers(key.removeprefix(UNET_PREFIX)) for key in keys}
        except ValueError as error:
            reason = reason or error
    raise DiffgraftError(f"{path} holds weights of an unknown kind of UNet: {reason}.") from reason


def _add_text_weight(weights: Weights, file: Any, part: str, key: str, prefix: str, layers: int) -> None:
    inside = key.removeprefix(prefix)
    if not is_open_clip(prefix):
        weights.add(f"{part}.{inside}", file, key)
        return
    number = re.match(r"transformer\.resblocks\.(\d+)\.", inside)
    if number and int(number[1]) >= layers:  # files of Stable Diffusion 2 have a last layer that is not used
        return
    for name, third, transposed in clip_names_from_open_clip(inside):
        weights.add(f"{part}.{name}", file, key, third, transposed)


def _layers(family: str, part: str) -> int:
    config = json.loads((CONFIGS / family / part / "config.json").read_text("utf-8"))
    return int(config["num_hidden_layers"])
