"""What is learnt in the benchmark: two made-up subjects, a style, and folders of photographs.

For each, the pictures to learn from, pictures left out of training to measure on, and, where there is a drawing of it,
references: new scenes drawn with it, and the like without it.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from diffgraft.bases import Base
from diffgraft.bases.tiny.world import STYLES, draw
from diffgraft.bases.tiny.world.scene import SETTING_WORDS, random_scene
from diffgraft.data.class_images import class_images
from diffgraft.data.image_folder import read_folder
from diffgraft.demo.style import SCREEN_PRINT, words
from diffgraft.demo.subject import ALIEN, POODLE, Subject
from diffgraft.generation.generate import Settings
from diffgraft.trainers.hooks.validation_set import ValidationSet, validation_set_from_images

UNSEEN_CLASS_SEED = 77_000
"""Seed of the class pictures that drift is measured on; training uses others."""
NEW_SETTINGS = ("snow", "night", "jungle")
"""Settings that no picture of a subject shows, neither in training nor among the held-out ones."""
PER_PROMPT = 12
"""Pictures drawn for each new setting of a subject"""
REFERENCES = 40
"""Reference pictures of each new prompt, with the subject or style and without it"""


@dataclass(frozen=True, eq=False)
class NewPrompt:
    """A prompt to draw after training, and what right answers look like."""

    text: str
    """With ``{it}`` where what was learnt is named"""
    count: int
    """Pictures to draw"""
    thing: str | None
    """What the judge should see; None where the thing is the one that was learnt"""
    setting: str
    having: Sequence[Image.Image] = field(repr=False, default=())
    """References that show what was learnt"""
    lacking: Sequence[Image.Image] = field(repr=False, default=())
    """The like without it"""


@dataclass(frozen=True, eq=False)
class Target:
    """One thing to learn."""

    name: str
    recipe: str
    noun: str
    learn: Path
    held_out: Sequence[Image.Image] = field(repr=False)
    texts: Sequence[str]
    """What stands on each held-out picture, with ``{it}``"""
    without: Sequence[str]
    """The same, without what was learnt: whoever says this should not get it"""
    masks: Sequence[Image.Image] | None = field(repr=False, default=None)
    new: Sequence[NewPrompt] = ()

    def probe(self, base: Base) -> ValidationSet:
        """The held-out loss, where there are masks on the subject's own pixels."""
        return validation_set_from_images(base, self.held_out, self.masks)

    def class_probe(self, base: Base) -> tuple[ValidationSet, list[str]]:
        """Pictures that the bare base draws under the prompts without what is learnt, and the prompt of each."""
        prompts = list(dict.fromkeys(self.without))
        side = (base.resolution, base.resolution)
        drawn = class_images(base, prompts, 32 // len(prompts), Settings(size=side), UNSEEN_CLASS_SEED)
        return validation_set_from_images(base, [picture.image for _, picture in drawn]), [text for text, _ in drawn]


def of_subject(subject: Subject) -> Target:
    """A made-up subject, asked for in settings it was never shown in."""
    held_out = [picture.image for picture in read_folder(subject.folder / "held-out")]
    masks = [Image.open(path) for path in sorted((subject.folder / "held-out-masks").glob("*.png"))]
    new = []
    for number, setting in enumerate(NEW_SETTINGS):
        scenes = subject.scenes((setting,) * REFERENCES, 500 + number)
        rng = np.random.default_rng([900, number])
        others = [random_scene(rng, thing=subject.noun, setting=setting, style="flat") for _ in scenes]
        having = [draw(scene, subject.cutout())[0] for scene in scenes]
        lacking = [draw(scene)[0] for scene in others]
        new.append(NewPrompt(f"a {{it}} {SETTING_WORDS[setting][0]}", PER_PROMPT, None, setting, having, lacking))
    count = len(held_out)
    return Target(
        subject.name,
        "subject",
        subject.noun,
        subject.folder / "learn",
        held_out,
        ["a {it}"] * count,
        [f"a {subject.noun}"] * count,
        masks,
        new,
    )


def of_style() -> Target:
    """The made-up style, asked for with things and settings it was never shown with."""
    pictures = read_folder(SCREEN_PRINT.folder / "held-out")
    captions = [str(picture.caption) for picture in pictures]
    new = []
    for number, (thing, setting) in enumerate(SCREEN_PRINT.held_out):
        scenes = [SCREEN_PRINT.scene(thing, setting, 1000 * (number + 1) + i) for i in range(REFERENCES)]
        having = [SCREEN_PRINT.draw(scene) for scene in scenes]
        lacking = [draw(replace(scene, style=_style_of(i)))[0] for i, scene in enumerate(scenes)]
        text = f"{words(thing, setting)}, {{it}} style"
        new.append(NewPrompt(text, 4, thing, setting, having, lacking))
    return Target(
        SCREEN_PRINT.name,
        "style",
        "",
        SCREEN_PRINT.folder / "learn",
        [picture.image for picture in pictures],
        [f"{caption}, {{it}} style" for caption in captions],
        captions,
        new=new,
    )


def _style_of(number: int) -> str:
    return list(STYLES)[number % len(STYLES)]


def of_photographs(folder: Path, noun: str) -> Target:
    """A folder of photographs, of which every third is left out of training."""
    pictures = read_folder(folder)
    learn = Path(tempfile.mkdtemp(prefix="diffgraft-photos-"))
    for number, picture in enumerate(pictures):
        if number % 3 != 2:
            picture.image.save(learn / f"{number:02d}.png")
    held_out = [picture.image for picture in pictures[2::3]]
    return Target(
        f"photographs of {folder.name}",
        "subject",
        noun,
        learn,
        held_out,
        ["a {it}"] * len(held_out),
        [f"a {noun}"] * len(held_out),
    )


@cache
def made_up() -> dict[str, Target]:
    """The targets that ship, by name."""
    listed = (of_subject(POODLE), of_subject(ALIEN), of_style())
    return {target.name: target for target in listed}
