"""Training examples, and which of them a step sees: a function of the seed and the step, never of what ran before."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from diffgraft.bases import SizeConditioning
from diffgraft.data.captions import PromptBuilder
from diffgraft.data.latents import Encoded
from diffgraft.data.settings import Masks, Tags
from diffgraft.rng import numpy_generator, permutation

_WAYS, _WORDS, _TURNS = 1_000_003, 1_000_005, 1_000_007
"""Streams of random numbers beside those of the buckets, which are counted from 0"""


@dataclass(frozen=True)
class Example:
    """A picture to learn from."""

    name: str
    rows: range
    """Its rows of the latents, one for each frame it is shown in; all of one size"""
    wording: PromptBuilder
    """What is said of it"""
    class_wording: PromptBuilder = field(default_factory=lambda: PromptBuilder(("",)))
    """The same of its class, text by text, where there is prior preservation by prediction"""
    repeats: int = 1
    """How often it comes in a round"""
    weight: float = 1.0
    """Factor on its loss"""
    content: str = ""
    """SHA-256 of its file, and of its mask's"""


@dataclass(frozen=True)
class Shown:
    """An example at one place of the line: in one of its frames, under one of its texts."""

    example: Example
    row: int
    text: int


@dataclass(frozen=True)
class Examples:
    """What is learnt from, in an endless, shuffled line that is cut into batches of one size of picture each."""

    encoded: Encoded
    examples: Sequence[Example]
    tags: Tags = field(default_factory=lambda: Tags.model_validate({}))
    dropout: float = 0.0
    """Probability that nothing is said"""
    masks: Masks = field(default_factory=lambda: Masks.model_validate({}))
    """How much what a mask leaves out counts"""

    @cached_property
    def _turns(self) -> list[tuple[int, int]]:
        """Example and how manieth of its repeats, of each place in a round."""
        return [(place, turn) for place, one in enumerate(self.examples) for turn in range(one.repeats)]

    @cached_property
    def _buckets(self) -> tuple[list[list[int]], list[int]]:
        """Places in a round by the size of their pictures; and the bucket of each place."""
        sizes = [self.encoded.frames[self.examples[example].rows[0]].size for example, _ in self._turns]
        order = sorted(set(sizes))
        buckets = [[place for place, own in enumerate(sizes) if own == size] for size in order]
        return buckets, [order.index(size) for size in sizes]

    def at(self, seed: int, place: int, count: int) -> list[Shown]:
        """The batch of `count` examples at `place`, a multiple of `count`.

        Of n places in a round, each bucket has its share of any n batches, and within a bucket every picture comes once
        before one comes again; each of its frames is shown under each of its texts before two meet again.
        """
        buckets, bucket_of = self._buckets
        cycle, at = divmod(place // count, len(bucket_of))
        bucket, earlier = 0, at
        if len(buckets) > 1:
            order = permutation(len(bucket_of), seed, _TURNS, cycle)
            bucket = bucket_of[order[at]]
            earlier = sum(bucket_of[other] == bucket for other in order[:at])
        own = buckets[bucket]
        first = (cycle * len(own) + earlier) * count
        return [self._shown(seed, own, bucket, first + number) for number in range(count)]

    def _shown(self, seed: int, own: list[int], bucket: int, place: int) -> Shown:
        """What stands at a place of a bucket's line."""
        turn, at = divmod(place, len(own))
        index, repeat = self._turns[own[permutation(len(own), seed, bucket, turn)[at]]]
        one = self.examples[index]
        ways = len(one.rows) * len(one.wording.texts)
        again, way = divmod(turn * one.repeats + repeat, ways)
        if ways > 1:
            way = permutation(ways, seed + index, _WAYS, again)[way]
        return Shown(one, one.rows[way % len(one.rows)], way // len(one.rows))

    def prompt(self, shown: Shown, seed: int, place: int, kind: int) -> str:
        """What is said of it at this place."""
        return self._said(shown.example.wording, shown, seed, place, kind)

    def class_prompt(self, shown: Shown, seed: int, place: int, kind: int) -> str:
        """What is said of its class at this place: the same text, with the same tags."""
        return self._said(shown.example.class_wording, shown, seed, place, kind)

    def _said(self, wording: PromptBuilder, shown: Shown, seed: int, place: int, kind: int) -> str:
        return wording.prompt(shown.text, self.tags, self.dropout, numpy_generator(seed, _WORDS, place, kind + 1))

    def size_conditioning(self, shown: Sequence[Shown]) -> list[SizeConditioning]:
        """How each was cut."""
        return [self.encoded.frames[one.row].size_conditioning() for one in shown]

    def weight_map(self, shown: Sequence[Shown]) -> Tensor | None:
        """Factor on the error at each place of each sample, [n, 1, h, w]; None where none of them has a mask."""
        masks = [self.encoded.masks[one.row] for one in shown]
        if not any(mask is not None for mask in masks):
            return None
        shape = self.encoded.latents.shape(shown[0].row)[1:]
        mask = torch.stack([torch.ones(shape) if mask is None else mask for mask in masks]).unsqueeze(1)
        weight = self.masks.outside + (1 - self.masks.outside) * mask
        if self.masks.normalize:
            weight = weight / weight.flatten(1).mean(1).clamp_min(1e-6).view(-1, 1, 1, 1)
        return weight
