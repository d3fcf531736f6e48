"""A base's weights on disk, each read when it is asked for: for work that goes from layer to layer and needs no more.

Names are those of adapters' paths, with the parameter behind: ``unet.mid_block.attentions.0.proj_in.weight``,
``text_encoder.encoder.layers.0.self_attn.q_proj.bias``. The VAE is left out.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffgraft.bases.checkpoint_files import files_of_part
from diffgraft.bases.header_config import read_config_overrides
from diffgraft.bases.ldm_keys import MAX_LEVELS, UNET_PREFIX, BlockLayout, clip_names_from_open_clip, is_open_clip
from diffgraft.bases.loading import CONFIGS, TINY
from diffgraft.bases.registry import families, part_names
from diffgraft.errors import DiffgraftError

_COUNTS = (2, 1, 3, 4)
"""Layers in a block that UNets may have, the usual first."""
_LAYER = re.compile(r"unet\.down_blocks\.\d+\.resnets\.(\d+)\.")


class Weights(Mapping[str, Tensor]):
    """Name → weight, in the precision of the file. A context manager: leaving it closes the files."""

    def __init__(self) -> None:
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
        """The shape of one weight; it is not read for that."""
        return self._shapes[name]

    @property
    def layers_in_block(self) -> int | None:
        """Layers in a block of the UNet; None where there is no UNet."""
        numbers = [int(found[1]) + 1 for name in self if (found := _LAYER.match(name))]
        return max(numbers, default=None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path of a module → shape of its ``weight``; nothing is read for it."""
        return {name.removesuffix(".weight"): s for name, s in self._shapes.items() if name.endswith(".weight")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def open(self, path: Path) -> Any:
        """A safetensors file that stays open as long as this does."""
        try:
            return self._open.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise DiffgraftError(f"{path} is not a readable .safetensors file ({error}).") from error

    def add(self, name: str, file: Any, key: str, third: int | None = None, turned: bool = False) -> None:
        """The tensor under `key` of `file`, one `third` of its rows, or transposed, as the weight `name`."""
        rows, *rest = file.get_slice(key).get_shape() or [1]
        shape = (rows if third is None else rows // 3, *rest)

        def read() -> Tensor:
            if third is not None:
                found: Tensor = file.get_slice(key)[third * rows // 3 : (third + 1) * rows // 3]
            else:
                found = file.get_tensor(key)
            return found.T if turned else found.clone()

        self._readers[name] = read
        self._shapes[name] = shape[::-1] if turned else shape


def open_weights(source: str | Path) -> Weights:
    """The weights of ``tiny``, of a diffusers folder, or of a single ``.safetensors`` checkpoint.

    Raises:
        DiffgraftError: it is none of these, or a file in it cannot be read.
    """
    path = TINY if str(source) == "tiny" else Path(source).expanduser()
    weights = Weights()
    if path.is_dir():
        for part in part_names():
            for file in files_of_part(path / part):
                held = weights.open(file)
                for key in held.keys():  # noqa: SIM118  (not a mapping)
                    weights.add(f"{part}.{key.removeprefix('text_model.')}", held, key)
    elif path.is_file():
        _add_single_file(weights, path)
    else:
        raise DiffgraftError(
            f"There is no base {source}: give `tiny`, a diffusers folder or a .safetensors checkpoint."
        )
    if not weights:
        raise DiffgraftError(
            f"{path} holds no weights of a base: no unet/*.safetensors, and no names of the original layout."
        )
    return weights


def _add_single_file(weights: Weights, path: Path) -> None:
    held = weights.open(path)
    keys = list(held.keys())
    for key, name in _unet_names(path, [key for key in keys if key.startswith(UNET_PREFIX)]).items():
        weights.add(f"unet.{name}", held, key)
    for family in families().values():
        starts = family.single_file_prefixes
        if not starts or not all(any(key.startswith(start) for key in keys) for start in starts.values()):
            continue
        for part, start in starts.items():
            said = read_config_overrides(path, held.metadata() or {}).get(part, {})
            layers = said.get("num_hidden_layers", _layers(family.name, part))
            for key in keys:
                if key.startswith(start):
                    _add_text(weights, held, part, key, start, layers)
        return


def _unet_names(path: Path, keys: list[str]) -> dict[str, str]:
    """Key → diffusers' name; the layers in a block, by which keys are counted, are those that all keys fit."""
    reason: ValueError | None = None
    for count in _COUNTS:
        blocks = BlockLayout(count, (True,) * MAX_LEVELS)
        try:
            return {key: blocks.to_diffusers(key.removeprefix(UNET_PREFIX)) for key in keys}
        except ValueError as error:
            reason = reason or error
    raise DiffgraftError(f"{path} holds weights of a UNet that is not known here: {reason}.") from reason


def _add_text(weights: Weights, held: Any, part: str, key: str, start: str, layers: int) -> None:
    inside = key.removeprefix(start)
    if not is_open_clip(start):
        weights.add(f"{part}.{inside}", held, key)
        return
    number = re.match(r"transformer\.resblocks\.(\d+)\.", inside)
    if number and int(number[1]) >= layers:  # the last layer of Stable Diffusion 2 stands in files, and is not used
        return
    for name, third, turned in clip_names_from_open_clip(inside):
        weights.add(f"{part}.{name}", held, key, third, turned)


def _layers(family: str, part: str) -> int:
    config = json.loads((CONFIGS / family / part / "config.json").read_text("utf-8"))
    return int(config["num_hidden_layers"])
