"""Targets of the benchmark: made-up subjects, unseen glyphs, a made-up style, and folders of photographs.

Each target has training pictures and held-out pictures to measure on. Made-up targets also have references: drawings of
new scenes with the subject or style, and of similar scenes without it.
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
from diffgraft.bases.tiny.world.glyphs import HELD_BACK, HELD_BACK_FOR_TESTS, glyph_sprite
from diffgraft.bases.tiny.world.scene import SETTING_WORDS, random_scene
from diffgraft.bases.tiny.world.things import THINGS
from diffgraft.data.class_images import class_images
from diffgraft.data.image_folder import read_folder
from diffgraft.demo.style import SCREEN_PRINT, words
from diffgraft.demo.subject import ALIEN, HELD_OUT, POODLE, Subject, write_pictures
from diffgraft.generation.settings import DrawSettings
from diffgraft.trainers.hooks.validation_set import ValidationSet, validation_set_from_images

UNSEEN_CLASS_SEED = 77_000
"""Seed of the class pictures for measuring drift; training uses other seeds"""
NEW_SETTINGS = ("snow", "night", "jungle")
"""Settings that are in no picture of a subject, neither in training nor held out"""
PER_PROMPT = 12
"""Number of generated pictures for each new setting of a subject"""
BACKDROPS = ("white", "yellow", "blue", "green", "pink", "purple")
"""Colours of the plain backgrounds on which outlines of subjects are judged"""
REFERENCES = 40
"""Number of reference pictures of each new prompt: that many with the subject or style, and that many without it"""


@dataclass(frozen=True, eq=False)
class NewPrompt:
    """A prompt to generate after training, and references that show what the picture should look like."""

    text: str
    """Prompt, with ``{it}`` in place of the words for the subject or style"""
    count: int
    """Number of pictures to generate"""
    thing: str | None
    """Thing that the judge should recognise; None if it is the trained subject"""
    setting: str
    having: Sequence[Image.Image] = field(repr=False, default=())
    """References with the subject or style"""
    lacking: Sequence[Image.Image] = field(repr=False, default=())
    """References without it"""


@dataclass(frozen=True, eq=False)
class Target:
    """A subject or style to learn, with its training and held-out pictures."""

    name: str
    recipe: str
    noun: str
    learn: Path
    held_out: Sequence[Image.Image] = field(repr=False)
    texts: Sequence[str]
    """Prompt of each held-out picture, with ``{it}`` in place of the words for the subject or style"""
    without: Sequence[str]
    """Prompt of each held-out picture without the subject or style, which should not produce it"""
    masks: Sequence[Image.Image] | None = field(repr=False, default=None)
    new: Sequence[NewPrompt] = ()
    cutout: Image.Image | None = field(repr=False, default=None)
    """Cut-out of a made-up subject, RGBA, with its outline"""

    def validation_set(self, base: Base) -> ValidationSet:
        """Return the validation set of the held-out pictures; masks limit the loss to the pixels of the subject."""
        return validation_set_from_images(base, self.held_out, self.masks)

    def class_validation_set(self, base: Base) -> tuple[ValidationSet, list[str]]:
        """Return a validation set of pictures that the base generates for `without`, and the prompt of each picture."""
        prompts = list(dict.fromkeys(self.without))
        side = (base.resolution, base.resolution)
        drawn = class_images(base, prompts, 32 // len(prompts), DrawSettings(size=side), UNSEEN_CLASS_SEED)
        return validation_set_from_images(base, [picture.image for _, picture in drawn]), [text for text, _ in drawn]


def of_held_back(name: str) -> Target:
    """Return the target of a glyph that is in no picture of the world, in its own colours."""
    glyphs = {**HELD_BACK, **HELD_BACK_FOR_TESTS}
    seed = 100 + 2 * list(glyphs).index(name)
    subject = Subject(name, glyphs[name].noun, lambda: glyph_sprite(glyphs[name].glyph), (seed, seed + 1))
    folder = Path(tempfile.mkdtemp(prefix="diffgraft-subject-"))
    write_pictures(subject, folder)
    return of_subject(subject, folder)


def of_subject(subject: Subject, folder: Path | None = None) -> Target:
    """Return the target of a made-up subject, with new prompts in settings that are in no training picture.

    `folder` has its pictures, by default those that ship with diffgraft.
    """
    folder = folder or subject.folder
    held_out = [picture.image for picture in read_folder(folder / "held-out")]
    masks = []
    for path in sorted((folder / "held-out-masks").glob("*.png")):
        with Image.open(path) as mask:
            masks.append(mask.copy())
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
        folder / "learn",
        held_out,
        ["a {it}"] * count,
        [f"a {subject.noun}"] * count,
        masks,
        new,
        subject.cutout(),
    )


def known_things() -> tuple[list[Image.Image], list[Image.Image], list[str]]:
    """Return pictures of all things of the tiny world, framed as those of subjects, their masks and their prompts."""
    drawn = []
    for number, thing in enumerate(THINGS):
        scenes = replace(POODLE, noun=thing).scenes(HELD_OUT, 700 + number)
        drawn += [(*draw(scene), f"a {thing}") for scene in scenes[number % 2 :: 2]]
    pictures, masks, prompts = (list(column) for column in zip(*drawn, strict=True))
    return pictures, masks, prompts


def plain_drawings(cutout: Image.Image) -> list[Image.Image]:
    """Return drawings of a cut-out on plain backgrounds, one for each of `BACKDROPS`."""
    rng = np.random.default_rng(901)
    scenes = [random_scene(rng, setting="plain", style="flat") for _ in BACKDROPS]
    return [draw(replace(scene, backdrop=colour), cutout)[0] for scene, colour in zip(scenes, BACKDROPS, strict=True)]


def of_style() -> Target:
    """Return the target of the made-up style, with new prompts for things and settings that it was not trained on."""
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
    """Return the target of a folder of photographs, of which every third is held out of training."""
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
    """Return the made-up targets, which ship with diffgraft, by name."""
    listed = (of_subject(POODLE), of_subject(ALIEN), of_style())
    return {target.name: target for target in listed}
