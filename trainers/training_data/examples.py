"""Training examples in the order in which steps see them: a function of seed and sample index, not of earlier steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from diffgraft.bases import SizeConditioning
from diffgraft.data.captions import PromptBuilder
from diffgraft.data.frames import Crop
from diffgraft.data.latents import Encoded
from diffgraft.data.settings import Masks, Tags
from diffgraft.rng import numpy_generator, permutation

_VARIANT_STREAM, _PROMPT_STREAM, _EPOCH_STREAM = 1_000_003, 1_000_005, 1_000_007
"""Streams of random numbers, beside those of the buckets, which are counted from 0"""


@dataclass(frozen=True)
class Example:
    """A training image, encoded, with its prompts."""

    name: str
    rows: range
    """Rows of its latents, one for each frame (crop, mirrored crop) it is shown in; all of one size"""
    prompt_builder: PromptBuilder
    """Builds its prompts"""
    class_prompt_builder: PromptBuilder = field(default_factory=lambda: PromptBuilder(("",)))
    """Builds the class prompt for each of its texts, for prior preservation by prediction"""
    repeats: int = 1
    """Number of times it occurs in an epoch"""
    weight: float = 1.0
    """Factor on its loss"""
    content: str = ""
    """SHA-256 of its file, followed by those of its mask if masks are used, and of the file of its condition picture"""
    condition: Callable[[Crop], Tensor] | None = None
    """Function that returns its condition picture in a frame, [3, height, width]; None without a control network"""


@dataclass(frozen=True)
class ExampleVariant:
    """An example as one sample sees it: in one of its frames, with one of its texts."""

    example: Example
    row: int
    """Row of its latents"""
    text: int
    """Index of its text"""


@dataclass(frozen=True)
class Examples:
    """Training examples in an endless shuffled sequence, cut into batches of images of equal size.

    The sequence is a function of seed and sample index.
    """

    encoded: Encoded
    examples: Sequence[Example]
    tags: Tags = field(default_factory=lambda: Tags.model_validate({}))
    dropout: float = 0.0
    """Probability that a sample's prompt is empty"""
    masks: Masks = field(default_factory=lambda: Masks.model_validate({}))
    """How much the loss outside of masks counts"""

    @cached_property
    def _epoch(self) -> list[tuple[int, int]]:
        """For each position in an unshuffled epoch: index of the example, and which of its repeats it is."""
        return [(index, repeat) for index, example in enumerate(self.examples) for repeat in range(example.repeats)]

    @cached_property
    def _buckets(self) -> tuple[list[list[int]], list[int]]:
        """Positions in an epoch, grouped by image size; and for each position the index of its group."""
        sizes = [self.encoded.frames[self.examples[index].rows[0]].size for index, _ in self._epoch]
        order = sorted(set(sizes))
        buckets = [[position for position, own in enumerate(sizes) if own == size] for size in order]
        return buckets, [order.index(size) for size in sizes]

    def at(self, seed: int, sample_index: int, count: int) -> list[ExampleVariant]:
        """The batch of `count` examples that begins at `sample_index`, a multiple of `count`.

        With n positions in an epoch, any n consecutive batches contain each bucket in proportion to its size. Within a
        bucket every image occurs once before any recurs, and every combination of its frames and texts occurs once
        before any recurs.
        """
        buckets, bucket_of = self._buckets
        cycle, batch = divmod(sample_index // count, len(bucket_of))
        bucket, earlier = 0, batch
        if len(buckets) > 1:
            order = permutation(len(bucket_of), seed, _EPOCH_STREAM, cycle)
            bucket = bucket_of[order[batch]]
            earlier = sum(bucket_of[other] == bucket for other in order[:batch])
        positions = buckets[bucket]
        first = (cycle * len(positions) + earlier) * count
        return [self._variant(seed, positions, bucket, first + number) for number in range(count)]

    def _variant(self, seed: int, positions: list[int], bucket: int, number: int) -> ExampleVariant:
        """The sample that is `number` in the sequence of a bucket, whose examples have these positions in an epoch."""
        epoch, at = divmod(number, len(positions))
        index, repeat = self._epoch[positions[permutation(len(positions), seed, bucket, epoch)[at]]]
        example = self.examples[index]
        variants = len(example.rows) * len(example.prompt_builder.texts)
        cycle, variant = divmod(epoch * example.repeats + repeat, variants)
        if variants > 1:
            variant = permutation(variants, seed + index, _VARIANT_STREAM, cycle)[variant]
        return ExampleVariant(example, example.rows[variant % len(example.rows)], variant // len(example.rows))

    def prompt(self, variant: ExampleVariant, seed: int, sample_index: int, stream: int) -> str:
        """The prompt of a sample, with its tags shuffled and dropped as `tags` says."""
        return self._build_prompt(variant.example.prompt_builder, variant, seed, sample_index, stream)

    def class_prompt(self, variant: ExampleVariant, seed: int, sample_index: int, stream: int) -> str:
        """The class prompt of a sample, from the same text and with the same tags as its prompt."""
        return self._build_prompt(variant.example.class_prompt_builder, variant, seed, sample_index, stream)

    def _build_prompt(
        self, builder: PromptBuilder, variant: ExampleVariant, seed: int, sample_index: int, stream: int
    ) -> str:
        random = numpy_generator(seed, _PROMPT_STREAM, sample_index, stream + 1)
        return builder.prompt(variant.text, self.tags, self.dropout, random)

    def size_conditioning(self, variants: Sequence[ExampleVariant]) -> list[SizeConditioning]:
        """Size conditioning of each sample: its image's original size and crop."""
        return [self.frame_of(variant.example, variant.row) for variant in variants]

    def frame_of(self, example: Example, row: int) -> SizeConditioning:
        """Size conditioning of an example in one of its rows, with its condition picture if it has one."""
        crop = self.encoded.frames[row]
        control = None if example.condition is None else example.condition(crop)
        return crop.size_conditioning()._replace(control=control)

    def weight_map(self, variants: Sequence[ExampleVariant]) -> Tensor | None:
        """Factor on the error at each latent position of n samples, [n, 1, h, w]; None if no sample has a mask."""
        masks = [self.encoded.masks[variant.row] for variant in variants]
        if not any(mask is not None for mask in masks):
            return None
        shape = self.encoded.latents.shape(variants[0].row)[1:]
        mask = torch.stack([torch.ones(shape) if mask is None else mask for mask in masks]).unsqueeze(1)
        weight = self.masks.outside + (1 - self.masks.outside) * mask
        if self.masks.normalize:
            weight = weight / weight.flatten(1).mean(1).clamp_min(1e-6).view(-1, 1, 1, 1)
        return weight
