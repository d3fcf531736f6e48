"""Adapters in use by a session: their strengths, how these change between steps, and what is applied now."""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.strengths import Strength, block_of, strengths_of
from diffgraft.bases.registry import denoisers
from diffgraft.errors import DiffgraftError
from diffgraft.generation.adapter_library import LoadedAdapter
from diffgraft.generation.graft import Graft
from diffgraft.generation.grammar.tags import AdapterTag, Curve, Point


@dataclass(frozen=True)
class InUse:
    """An adapter of a session, and when it has which strength."""

    adapter: Adapter
    """A shallow copy, so that the same file may be in use twice"""
    strength: Strength = 1.0
    curve: Curve = (Point(1.0, 0.0, False),)
    """Factor on the strength of the denoiser, by step"""
    start: Point | None = None
    """First moment at which it has an effect; None: from the first step"""
    end: Point | None = None
    """Moment from which on it has none; None: to the last step"""
    source: str = ""
    """Name by which its file is known; empty for adapters that have no file"""
    hash: str = ""
    """Hash of the content of the file that it was read from; empty if it has none"""

    @classmethod
    def of_tag(cls, tag: AdapterTag, loaded: LoadedAdapter) -> "InUse":
        """Return the adapter that a tag of a prompt names, with the tag's strengths.

        Raises:
            DiffgraftError: the tag asks for a hypernetwork, but the adapter has none.
        """
        adapter = loaded.adapter
        if tag.kind == "hypernet" and not adapter.networks:
            raise DiffgraftError(f"{tag.name} is no hypernetwork: write <lora:{tag.name}:…> for it.")
        changed = {block_of(path) for path in adapter.deltas}
        blocks = {block: factor for block, factor in tag.blocks.items() if block in changed}
        strength = {"text_encoder": tag.text_encoder[0].strength, **blocks}
        return cls(copy(adapter), strength, tag.denoiser, tag.start, tag.end, tag.name, loaded.hash)

    def at(self, step: int, steps: int) -> Strength:
        """Return the strength in a step, counted from 0; the text encoders keep theirs."""
        factor = _factor(self.curve, step, steps)
        begins, ends = (_step_of(moment, steps) for moment in (self.start, self.end))
        if (begins is not None and step < begins) or (ends is not None and step >= ends):
            factor = 0.0
        return self.strength if factor == 1 else _with_factors(self.strength, factor)

    def strength_in_denoiser(self, step: int, steps: int) -> Strength:
        """Return the adapter's strength on the denoiser in a step, counted from 0, with 0 for the text encoders."""
        return _with_factors(self.at(step, steps), text=0.0)

    def for_text_encoders(self) -> "InUse":
        """Return the adapter with its strength on the text encoders, and 0 for the denoiser."""
        return replace(self, strength=_with_factors(self.strength, denoiser=0.0), curve=(Point(1.0, 0.0, False),))


class AppliedAdapters:
    """The adapters that are applied to a base now, and their strengths."""

    def __init__(self, target: Any) -> None:
        """Prepare a base or pipeline, without adapters."""
        self.graft = Graft(target, beside=True)
        self.in_use: dict[str, InUse] = {}
        self.strengths: dict[str, Strength] = {}
        """Name → strength in this step"""

    def apply(self, in_use: dict[str, InUse], step: int, steps: int) -> None:
        """Merge the adapters at their strengths of a step."""
        strengths = {name: item.at(step, steps) for name, item in in_use.items()}
        if strengths != self.strengths or any(in_use[name] is not self.in_use.get(name) for name in in_use):
            try:
                self.graft.set({item.adapter: strengths[name] for name, item in in_use.items()})
            except BaseException:  # the graft has removed all
                self.graft.set({item.adapter: self.strengths[name] for name, item in self.in_use.items()})
                raise
        self.in_use, self.strengths = in_use, strengths


def _factor(curve: Curve, step: int, steps: int) -> float:
    """Return the strength of a curve in a step: linear between its points, and constant before and after them."""
    at = float(step) if curve[0].in_steps else step / steps
    before = max((point for point in curve if point.at <= at), key=lambda point: point.at, default=curve[0])
    after = min((point for point in curve if point.at > at), key=lambda point: point.at, default=before)
    if after.at <= before.at:
        return before.strength
    share = (at - before.at) / (after.at - before.at)
    return before.strength + max(0.0, share) * (after.strength - before.strength)


def _step_of(moment: Point | None, steps: int) -> float | None:
    if moment is None:
        return None
    return moment.at if moment.in_steps else moment.at * steps


def _with_factors(strength: Strength, denoiser: float = 1.0, text: float = 1.0) -> dict[str, float]:
    """Return a strength whose parts are multiplied by a factor: that of the denoiser, and those of text encoders."""
    given = strengths_of("an adapter", strength)
    parts = {part: value * (denoiser if part in denoisers() else text) for part, value in given.parts.items()}
    return {**parts, **given.blocks}
