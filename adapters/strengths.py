"""Strengths of an adapter: a single number, or several, by part of the base or by block of the UNet.

Blocks have the names of stable-diffusion-webui: IN00 to IN11 for the down blocks, M00, OUT00 to OUT11 for the up
blocks, numbered as in the original layout (XL: up to IN08 and OUT08); BASE is everything else, including the text
encoders. Lists of numbers are those of webui's block-weight extension: 12 (layers of LoRA in XL), 17 (in 1.x and 2.x),
20 and 26 (all layers). The numbering assumes bases with two layers per level, which all of these have.
Source: hako-mikan/sd-webui-lora-block-weight, ``scripts/lora_block_weight.py``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import SupportsFloat

from diffgraft.adapters.adapter import Adapter, Network
from diffgraft.bases.ldm_keys import BlockLayout
from diffgraft.bases.registry import denoisers, has_blocks, part_names, tokenizers
from diffgraft.errors import DiffgraftError, did_you_mean

Strength = float | Mapping[str, float] | Sequence[float]
"""A strength for everything; by part and block; or by block, as a list in the order of one of `BLOCK_LISTS`"""


def _numbered(name: str, numbers: Sequence[int]) -> list[str]:
    return [f"{name}{number:02}" for number in numbers]


BLOCK_LISTS = {
    12: ["BASE", *_numbered("IN", (4, 5, 7, 8)), "M00", *_numbered("OUT", range(6))],
    17: ["BASE", *_numbered("IN", (1, 2, 4, 5, 7, 8)), "M00", *_numbered("OUT", range(3, 12))],
    20: ["BASE", *_numbered("IN", range(9)), "M00", *_numbered("OUT", range(9))],
    26: ["BASE", *_numbered("IN", range(12)), "M00", *_numbered("OUT", range(12))],
}
"""Length of a list of strengths → names of the blocks that it is for"""
BLOCKS = BLOCK_LISTS[26]
_TWO_LAYERS = BlockLayout(2, (True, True, True, True))
_ORIGINAL_BLOCK = re.compile(r"(?P<side>input|output)_blocks\.(?P<number>\d+)\.|(?P<middle>middle_block)\.")


def block_of(path: str) -> str:
    """Name of the block that contains the module at `path`: ``unet.mid_block.resnets.0.conv1`` → ``M00``."""
    part, _, inside = path.partition(".")
    if has_blocks(part):
        try:
            block = _ORIGINAL_BLOCK.match(_TWO_LAYERS.to_ldm(inside))
        except ValueError:
            block = None
        if block and block["middle"]:
            return "M00"
        if block:
            return f"{'IN' if block['side'] == 'input' else 'OUT'}{int(block['number']):02}"
    return "BASE"


@dataclass(frozen=True)
class Strengths:
    """Strengths of one adapter: of each part of the base, and of blocks that have a strength of their own."""

    parts: Mapping[str, float]
    """Part of the base → its strength"""
    blocks: Mapping[str, float] = field(default_factory=dict)
    """Block → factor on the strength of its part; blocks without one have 1"""
    named_blocks: tuple[str, ...] = ()
    """Blocks that were given by name, and not as a list"""

    @property
    def denoiser(self) -> float:
        """Strength of the denoiser, which also applies to networks hooked into it."""
        strengths = (self.parts[name] for name in denoisers())
        return next((value for value in strengths if value != 1), 1.0)  # a base has one denoiser, others are at 1

    def for_network(self, network: Network) -> float:
        """Strength of a network: that of the part that it acts on."""
        return self.denoiser if network.acts_on == "denoiser" else self.parts[network.acts_on]

    def at(self, path: str) -> float:
        """Strength for the module at `path`: that of its part times that of its block."""
        part = self.parts[path.partition(".")[0]]
        return part * self.blocks.get(block_of(path), 1.0) if self.blocks else part

    def unused_blocks(self, adapter: Adapter) -> list[str]:
        """Blocks that were given a strength by name although the adapter changes no module in them."""
        changed = {block_of(path) for path in adapter.deltas} if self.named_blocks else set()
        return [name for name in self.named_blocks if name not in changed]


def strengths_of(name: str, value: object) -> Strengths:
    """Parse the strength that a user gave; `name` is that of the adapter, for messages.

    Parts and blocks without a strength get 1; a second text encoder gets the strength of the first.

    Raises:
        DiffgraftError: a part or block is unknown, a list has another length than those in `BLOCK_LISTS`, or a value is
            not a number.
    """
    if isinstance(value, list | tuple):
        if len(value) not in BLOCK_LISTS:
            lengths = ", ".join(map(str, BLOCK_LISTS))
            hint = " Write fractions with a point: 0.8." if len(value) == 2 else ""
            raise DiffgraftError(
                f"Invalid strength of {name}: a list of {len(value)} numbers; lists by block have {lengths}.{hint}"
            )
        blocks = _numbers(name, dict(zip(BLOCK_LISTS[len(value)], value, strict=True)))
        return Strengths(dict.fromkeys(part_names(), 1.0), blocks)
    values = _numbers(name, value if isinstance(value, Mapping) else dict.fromkeys(part_names(), value))
    named_blocks = tuple(key for key in values if key in BLOCKS)
    if unknown := [key for key in values if key not in (*part_names(), *BLOCKS)]:
        hint = did_you_mean(unknown[0], (*part_names(), *BLOCKS) if unknown[0][:1].isupper() else part_names())
        raise DiffgraftError(f"Invalid strength of {name}: no part or block is called {unknown[0]!r}; {hint}")
    first, *further = tokenizers()
    if first in values:  # the name of the first text encoder stands for all of them
        values = {**dict.fromkeys(further, values[first]), **values}
    parts = {part: values.get(part, 1.0) for part in part_names()}
    return Strengths(parts, {key: number for key, number in values.items() if key in BLOCKS}, named_blocks)


def _numbers(name: str, values: Mapping[object, object]) -> dict[str, float]:
    return {str(key): _number(name, value) for key, value in values.items()}


def _number(name: str, value: object) -> float:
    if isinstance(value, SupportsFloat) and not isinstance(value, bool) and math.isfinite(float(value)):
        return float(value)
    raise DiffgraftError(f"Invalid strength of {name}: {value!r} is not a number. Use a number such as 0.8.")
