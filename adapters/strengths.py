"""Strengths of an adapter: one number, or several, by part of the base or by block of the UNet.

Blocks have the names of the webui world: IN00 to IN11 on the way down, M00, OUT00 to OUT11 on the way up, counted as
the original layout counts them (XL: to IN08 and OUT08); BASE is all the rest, the text encoders included. Lists of
numbers, too, are those of its block-weight extension: 12 (layers of LoRA in XL), 17 (in 1.x and 2.x), 20 and 26 (all
layers). The counting is that of bases with two layers in a level, as all of these have.
Source: hako-mikan/sd-webui-lora-block-weight, ``scripts/lora_block_weight.py``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import SupportsFloat

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases.ldm_keys import BlockLayout
from diffgraft.bases.registry import denoisers, has_blocks, part_names, tokenizers
from diffgraft.errors import DiffgraftError, did_you_mean

Strength = float | Mapping[str, float] | Sequence[float]
"""For all; by part and block; or by block in the order of one of `LISTS`"""


def _numbered(name: str, numbers: Sequence[int]) -> list[str]:
    return [f"{name}{number:02}" for number in numbers]


LISTS = {
    12: ["BASE", *_numbered("IN", (4, 5, 7, 8)), "M00", *_numbered("OUT", range(6))],
    17: ["BASE", *_numbered("IN", (1, 2, 4, 5, 7, 8)), "M00", *_numbered("OUT", range(3, 12))],
    20: ["BASE", *_numbered("IN", range(9)), "M00", *_numbered("OUT", range(9))],
    26: ["BASE", *_numbered("IN", range(12)), "M00", *_numbered("OUT", range(12))],
}
"""Length of a list of strengths → the blocks they are for."""
BLOCKS = LISTS[26]
_COUNTED = BlockLayout(2, (True, True, True, True))
_THEIRS = re.compile(r"(?P<side>input|output)_blocks\.(?P<number>\d+)\.|(?P<middle>middle_block)\.")


def block_of(path: str) -> str:
    """The block in which the module of an adapter's path lies: ``unet.mid_block.resnets.0.conv1`` → ``M00``."""
    part, _, inside = path.partition(".")
    if has_blocks(part):
        try:
            found = _THEIRS.match(_COUNTED.to_ldm(inside))
        except ValueError:
            found = None
        if found and found["middle"]:
            return "M00"
        if found:
            return f"{'IN' if found['side'] == 'input' else 'OUT'}{int(found['number']):02}"
    return "BASE"


@dataclass(frozen=True)
class Strengths:
    """What `strengths_of` has read: the strength of each part, and of the blocks that have their own."""

    parts: Mapping[str, float]
    blocks: Mapping[str, float] = field(default_factory=dict)
    named: tuple[str, ...] = ()
    """Blocks that were named one by one"""

    @property
    def of_denoiser(self) -> float:
        """The strength of the denoiser, which networks laid over it have."""
        own = (self.parts[name] for name in denoisers())
        return next((value for value in own if value != 1), 1.0)  # a base has one of them, the others are at 1

    def at(self, path: str) -> float:
        """The strength for the module at an adapter's path; a block's is multiplied with its part's."""
        whole = self.parts[path.partition(".")[0]]
        return whole * self.blocks.get(block_of(path), 1.0) if self.blocks else whole

    def idle(self, adapter: Adapter) -> list[str]:
        """Blocks that were named, and in which the adapter changes nothing."""
        changed = {block_of(path) for path in adapter.deltas} if self.named else set()
        return [name for name in self.named if name not in changed]


def strengths_of(name: str, value: object) -> Strengths:
    """Read what a person gave; `name` is the adapter's, for errors.

    A part that is not named has 1, a second text encoder what the first one has; a block that is not named has 1.

    Raises:
        DiffgraftError: there is no such part or block, a list has another length than those of `LISTS`, or something
            is no number.
    """
    if isinstance(value, list | tuple):
        if len(value) not in LISTS:
            known = ", ".join(map(str, LISTS))
            hint = " A fraction is written with a point, 0.8." if len(value) == 2 else ""
            raise DiffgraftError(f"{name} has a list of {len(value)} strengths; lists for blocks have {known}.{hint}")
        return Strengths(
            dict.fromkeys(part_names(), 1.0), _checked(name, dict(zip(LISTS[len(value)], value, strict=True)))
        )
    given = value if isinstance(value, Mapping) else dict.fromkeys(part_names(), value)
    checked = _checked(name, given)
    named = tuple(key for key in checked if key in BLOCKS)
    if unknown := [key for key in checked if key not in (*part_names(), *BLOCKS)]:
        hint = did_you_mean(unknown[0], (*part_names(), *BLOCKS) if unknown[0][:1].isupper() else part_names())
        raise DiffgraftError(f"The strength of {name} is for {unknown[0]!r}: {hint}")
    first, *further = tokenizers()
    if first in checked:  # of several text encoders, all are meant
        checked = {**dict.fromkeys(further, checked[first]), **checked}
    parts = {part: checked.get(part, 1.0) for part in part_names()}
    return Strengths(parts, {key: number for key, number in checked.items() if key in BLOCKS}, named)


def _checked(name: str, given: Mapping[object, object]) -> dict[str, float]:
    return {str(key): _number(name, value) for key, value in given.items()}


def _number(name: str, value: object) -> float:
    if isinstance(value, SupportsFloat) and not isinstance(value, bool) and math.isfinite(float(value)):
        return float(value)
    raise DiffgraftError(f"The strength of {name} is {value!r}, which is no number. Use 0 to 1, or so.")
