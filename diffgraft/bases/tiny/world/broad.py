"""The broad world the denoiser is trained on: the tiny world, things by their glyphs' names, and made-up subjects.

Its own 24 things keep their prompts; glyphs give it hundreds of further outlines; made-up subjects teach it that
a rare word before a noun may mean any shape at all.
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

OWN, BY_NAME = 0.35, 0.33
"""Shares of the world's own things and of things known by their glyphs' names; the rest is made up."""
NAMED_CREATURES = 768
"""So many made-up subjects keep one rare word each; all others are seen once, under any rare word."""
NAMED_SHARE = 0.4
"""Share of the pictures of made-up subjects that show one with a word of its own."""


@dataclass(frozen=True)
class Sample:
    """One picture of the broad world, before it is drawn."""

    scene: Scene
    creature: int | None = None
    """Number of the made-up subject; None where the scene's thing is one known by name."""
    rare: str = ""
    """The rare word that stands before the noun; empty where the caption has none."""

    def draw(self) -> Image.Image:
        """The picture, RGB, 64 × 64."""
        return draw(self.scene, self._cutout())[0]

    def caption(self, rng: Rng) -> str:
        """Words for the picture, in one of several wordings."""
        return caption(self.scene, rng, self.rare)

    def _cutout(self) -> Image.Image | None:
        if self.creature is not None:
            return creature(self.creature)[1]
        if self.scene.thing in THINGS:
            return None
        cutout = glyph_sprite(str(self.scene.glyph))
        if self.scene.colour is None:
            return cutout
        return Image.fromarray(recolour(np.asarray(cutout), COLOURS[self.scene.colour]))


def nouns() -> tuple[str, ...]:
    """Every noun that a caption of the broad world may hold."""
    return (*THINGS, *glyph_names(), *NOUNS)


def random_sample(rng: Rng, rare_words: Sequence[str]) -> Sample:
    """A picture drawn from the broad world's distribution; the first words of `rare_words` belong to creatures.

    Args:
        rng: Source of everything random.
        rare_words: More than `NAMED_CREATURES` words, always in the same order.
    """
    named, free = rare_words[:NAMED_CREATURES], rare_words[NAMED_CREATURES:]
    scene, kind = random_scene(rng), rng.random()
    if kind < OWN:
        return Sample(scene, rare=str(rng.choice(free)) if rng.random() < 0.05 else "")
    scene = _framed(scene, rng)
    if rng.random() < 0.3:  # new outlines are best learnt where nothing hides them
        scene = replace(scene, style="flat")
    if rng.random() < 0.1:
        scene = replace(scene, setting="plain")
    if kind < OWN + BY_NAME:
        names = glyph_names()
        name = list(names)[int(rng.integers(len(names)))]
        colour = scene.colour if rng.random() < 0.4 else None  # a fifth are painted: half of all scenes name a colour
        return Sample(replace(scene, thing=name, glyph=str(rng.choice(names[name])), colour=colour))
    scene = replace(scene, colour=None, glyph=None)
    if rng.random() < NAMED_SHARE:
        number = int(rng.integers(len(named)))
        return Sample(replace(scene, thing=noun_of(number)), number, named[number])
    number = int(rng.integers(NAMED_CREATURES, 2**40))
    return Sample(replace(scene, thing=noun_of(number)), number, str(rng.choice(free)))


def _framed(scene: Scene, rng: Rng) -> Scene:
    """The scene with size, place and tilt from a wider range than the tiny world's own."""
    size = float(rng.uniform(0.5, 0.86))
    room = (1 - size) / 2 + 0.06
    return replace(
        scene,
        size=size,
        x=float(0.5 + rng.uniform(-room, room)),
        y=float(0.54 + rng.uniform(-room, room) * 0.8),
        tilt=float(np.clip(rng.normal(0, 8), -20, 20)),
    )
