"""The broad world on which the denoiser is trained: the tiny world, things drawn from glyphs, and made-up subjects.

The 24 things of the tiny world keep their captions. Glyphs, captioned by their names, add hundreds of outlines.
Made-up subjects teach the denoiser that a rare word before a noun can mean any shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from diffgraft.bases.tiny.world.creatures import NOUNS, creature, noun_of
from diffgraft.bases.tiny.world.glyphs import glyph_names, glyph_sprite
from diffgraft.bases.tiny.world.scene import Scene, caption, draw, random_scene
from diffgraft.bases.tiny.world.things import COLOURS, THINGS, recolour

Rng = np.random.Generator

OWN, BY_NAME = 0.5, 0.25
"""Shares of the tiny world's things and of things drawn from glyphs; all other samples are made-up subjects."""
NAMED_CREATURES = 768
"""Number of made-up subjects with a fixed rare word each; all others appear once, with a random rare word."""
NAMED_SHARE = 0.4
"""Share of the pictures of made-up subjects that show a subject with a fixed rare word."""


@dataclass(frozen=True)
class Sample:
    """Description of one picture of the broad world, from which the picture and its captions are made."""

    scene: Scene
    creature: int | None = None
    """Number of the made-up subject; None if the scene shows a thing of the tiny world or a glyph."""
    rare: str = ""
    """Rare word before the noun in the caption; empty if the caption has no rare word."""

    def draw(self) -> Image.Image:
        """Draw the picture, RGB, 64 × 64."""
        return draw(self.scene, self._cutout())[0]

    def caption(self, rng: Rng) -> str:
        """Return a caption for the picture, in a random wording."""
        return caption(self.scene, rng, self.rare)

    def _cutout(self) -> Image.Image | None:
        """Return the cut-out (RGBA) of the made-up subject or glyph; None for a thing of the tiny world."""
        if self.creature is not None:
            return creature(self.creature)[1]
        if self.scene.thing in THINGS:
            return None
        cutout = glyph_sprite(str(self.scene.glyph))
        if self.scene.colour is None:
            return cutout
        return Image.fromarray(recolour(np.asarray(cutout), COLOURS[self.scene.colour]))


def nouns() -> tuple[str, ...]:
    """Return every noun that a caption of the broad world can contain."""
    return (*THINGS, *glyph_names(), *NOUNS)


def random_sample(rng: Rng, rare_words: Sequence[str]) -> Sample:
    """Return a random sample of the broad world.

    Args:
        rng: Source of all random choices.
        rare_words: More than `NAMED_CREATURES` words, always in the same order; the first `NAMED_CREATURES` of them
            belong to fixed made-up subjects.
    """
    named, free = rare_words[:NAMED_CREATURES], rare_words[NAMED_CREATURES:]
    scene, kind = random_scene(rng), rng.random()
    if kind < OWN:
        return Sample(scene, rare=str(rng.choice(free)) if rng.random() < 0.05 else "")
    scene = _framed(scene, rng)
    if rng.random() < 0.3:  # new outlines are learned best in the flat style, which does not blur them
        scene = replace(scene, style="flat")
    if rng.random() < 0.1:
        scene = replace(scene, setting="plain")
    if kind < OWN + BY_NAME:
        names = glyph_names()
        name = list(names)[int(rng.integers(len(names)))]
        colour = scene.colour if rng.random() < 0.4 else None  # a fifth: half of all scenes have a colour
        return Sample(replace(scene, thing=name, glyph=str(rng.choice(names[name])), colour=colour))
    scene = replace(scene, colour=None, glyph=None)
    if rng.random() < NAMED_SHARE:
        number = int(rng.integers(len(named)))
        return Sample(replace(scene, thing=noun_of(number)), number, named[number])
    number = int(rng.integers(NAMED_CREATURES, 2**40))
    return Sample(replace(scene, thing=noun_of(number)), number, str(rng.choice(free)))


def _framed(scene: Scene, rng: Rng) -> Scene:
    """Return the scene with size, position and tilt from a wider range than in the tiny world."""
    size = float(rng.uniform(0.5, 0.86))
    room = (1 - size) / 2 + 0.06
    return replace(
        scene,
        size=size,
        x=float(0.5 + rng.uniform(-room, room)),
        y=float(0.54 + rng.uniform(-room, room) * 0.8),
        tilt=float(np.clip(rng.normal(0, 8), -20, 20)),
    )
