"""Tags of adapters in a prompt: ``<lora:name:0.8>``, ``<lora:name:te=0.5:unet=1:lbw=M00>`` and ``<hypernet:name:1>``.

webui reads ``<lora:name:text encoder:denoiser>``, its extension for block weights adds ``lbw=``, ``start=`` and
``stop=``, and loractl strengths by step, ``0@0,1@0.5``. All of them are read here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from diffgraft.adapters.strengths import BLOCK_LISTS, BLOCKS
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.generation.grammar.attention import as_number

KINDS = {"lora": "lora", "lyco": "lora", "hypernet": "hypernet"}
"""Kind of a tag → what it names: an adapter of weights, or a hypernetwork"""

TAG = re.compile(r"<(\w+):([^<>]+)>")
"""A tag; its groups are the kind and the rest"""
_PARTS = {"te": "text_encoder", "unet": "denoiser"}
_NAMED = (*_PARTS, "lbw", "start", "stop", "end", "in", "mid", "out")


class Point(NamedTuple):
    """A strength at one moment of the denoising; between two points it changes linearly."""

    strength: float
    at: float
    """Share of the steps from 0 to 1, or a number of steps if `in_steps`"""
    in_steps: bool


Curve = tuple[Point, ...]
"""Strength by step; a single point is the same strength in all steps"""


@dataclass(frozen=True)
class AdapterTag:
    """An adapter that a prompt names, with its strengths."""

    kind: str
    """``lora`` or ``hypernet``"""
    name: str
    """Name as written, often without a suffix"""
    text_encoder: Curve
    denoiser: Curve
    blocks: Mapping[str, float] = field(default_factory=dict)
    """Block → factor on the strength of the denoiser"""
    start: Point | None = None
    """First moment at which the adapter has an effect; None: from the first step"""
    end: Point | None = None
    """Moment from which on it has none; None: to the last step"""


@lru_cache(maxsize=256)
def split_tags(prompt: str) -> tuple[str, tuple[AdapterTag, ...]]:
    """Take the tags out of a prompt.

    Returns:
        The prompt without them, and the tags in order.

    Raises:
        DiffgraftError: a tag is of an unknown kind, or one of its values is none; the message quotes it.
    """
    return TAG.sub("", prompt), tuple(_read(match[0], match[1], match[2]) for match in TAG.finditer(prompt))


def _read(source: str, kind: str, arguments: str) -> AdapterTag:
    if kind not in KINDS:
        raise DiffgraftError(
            f"The prompt has {source}, which names an unknown kind of adapter: {did_you_mean(kind, KINDS)} If you mean "
            "no adapter, write it without < and >."
        )
    name, *rest = (argument.strip() for argument in arguments.split(":"))
    places, named = [], {}
    for argument in rest:
        key, equals, value = argument.partition("=")
        if equals:
            named[key.strip()] = value.strip()
        else:
            places.append(argument)
    if len(places) > len(_PARTS):
        raise DiffgraftError(
            f"{source} has {len(places)} strengths: there are two, of the text encoder and of the denoiser."
        )
    for key in named:
        if key not in _NAMED:
            raise DiffgraftError(f"{source} has the unknown setting {key}: {did_you_mean(key, _NAMED)}")
    text = _curve(source, named.get("te", places[0] if places else "1"))
    own = named.get("unet", places[1] if len(places) > 1 else None)
    return AdapterTag(
        KINDS[kind],
        name,
        text,
        text if own is None else _curve(source, own),
        _blocks(source, named),
        _moment(source, named.get("start")),
        _moment(source, named.get("end", named.get("stop"))),
    )


def _curve(source: str, text: str) -> Curve:
    """Read a number, or strengths at moments such as ``0@0,1@0.5``."""
    points = []
    moments = [part.partition("@")[2] for part in text.split(",")]
    in_steps = any("." not in moment and (as_number(moment) or 0) > 1 for moment in moments)
    for part in text.split(","):
        strength, separator, moment = part.partition("@")
        number = as_number(strength)
        if number is None:
            raise DiffgraftError(
                f"The strength {text!r} in {source} is not a number: write 0.8, or strengths at shares of the steps, "
                "such as 0@0,1@0.5."
            )
        at = _moment(source, moment, in_steps) if separator else Point(number, 0.0, False)
        assert at is not None
        points.append(Point(number, at.at, at.in_steps))
    if len({point.in_steps for point in points}) > 1:
        raise DiffgraftError(
            f"The strengths {text!r} in {source} mix shares and numbers of steps: write all moments with a point, or "
            "none."
        )
    return tuple(sorted(points, key=lambda point: point.at))


def _moment(source: str, text: str | None, counts_steps: bool = False) -> Point | None:
    """Read a moment: with a point a share of the steps, without one a number of steps.

    0 and 1 are shares, unless `counts_steps` as others of the same curve are steps.
    """
    if text is None:
        return None
    number = as_number(text)
    if number is None or number < 0:
        raise DiffgraftError(
            f"The moment {text!r} in {source} is none: write a share of the steps such as 0.5, or a number of steps."
        )
    in_steps = "." not in text and (number > 1 or counts_steps)
    if not in_steps and number > 1:
        raise DiffgraftError(
            f"The moment {text!r} in {source} is a share above 1: write 12 for the twelfth step, or a"
            " share of the steps from 0 to 1."
        )
    return Point(1.0, number, in_steps)


def _blocks(source: str, named: Mapping[str, str]) -> dict[str, float]:
    """Read ``lbw=``, a list of 12, 17, 20 or 26 numbers or the name of one block, and ``in=``, ``mid=``, ``out=``."""
    factors: dict[str, float] = {}
    if text := named.get("lbw"):
        if text in BLOCKS:
            factors = {block: float(block in (text, "BASE")) for block in BLOCKS}
        else:
            numbers = [as_number(part) for part in text.split(",")]
            if len(numbers) not in BLOCK_LISTS or None in numbers:
                raise DiffgraftError(
                    f"lbw={text} in {source} must be a block such as M00, or a list of "
                    f"{' or '.join(map(str, BLOCK_LISTS))} numbers."
                )
            factors = {
                block: number
                for block, number in zip(BLOCK_LISTS[len(numbers)], numbers, strict=True)
                if number is not None
            }
    for key, prefix in (("in", "IN"), ("mid", "M"), ("out", "OUT")):
        if key in named:
            number = as_number(named[key])
            if number is None:
                raise DiffgraftError(
                    f"The strength {named[key]!r} of {key} in {source} is not a number: write {key}=0.8, for example."
                )
            factors |= {block: number for block in BLOCKS if block.startswith(prefix)}
    return factors
