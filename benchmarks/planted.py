"""Pictures as adapters draw them that have learned too little, well, or by heart, drawn by the tiny world itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from diffgraft.bases.tiny.world import draw
from diffgraft.bases.tiny.world.scene import SETTING_WORDS, random_scene
from diffgraft.data.image_folder import read_folder
from diffgraft.demo.style import SCREEN_PRINT, words
from diffgraft.demo.subject import ALIEN, LEARN, POODLE, Subject
from diffgraft.evaluation.encoders import Encoders
from diffgraft.evaluation.evidence import Drawings, Evidence, Prompts, Reference
from diffgraft.evaluation.measure import get_measure
from diffgraft.evaluation.prompts import Words, read_prompts
from diffgraft.evaluation.scoring import Scorer
from diffgraft.evaluation.verdict import Outcome

SEEDS = 4
"""Pictures of each prompt"""
MEASURES = ("clip-i", "patches", "contrast", "structure", "diversity", "drift")
PLANTED = {"too little": "too little", "good": "good", "by heart": "overcooked", "leaks": "overcooked"}
"""What is drawn → its verdict: `by heart` has the scenes of training pictures whatever the prompt, and `leaks` shows
what was learned without the trigger too"""
SUBJECTS = {"alien": ALIEN, "poodle": POODLE}
_SETTINGS = ("snow", "beach", "night")
_PAIRS = (SCREEN_PRINT.held_out[0], *SCREEN_PRINT.learn[1:4])
"""Thing and setting of each prompt in the style"""
_LITTLE = 0.1
"""Share of the pictures of `too little` that show what was to be learned"""
Picture = Callable[[int, int, float, bool], Image.Image]
"""Draws prompt, seed, share of pictures that show what was learned, and whether prompts are ignored"""


def subject_picture(subject: Subject, prompt: int, seed: int, share: float, forgets: bool) -> Image.Image:
    """Draw a subject, or another thing of its class at the same seed."""
    rng = np.random.default_rng([seed, 7])
    setting = str(rng.choice(LEARN)) if forgets else _SETTINGS[prompt]
    (scene,) = subject.scenes((setting,), seed)
    if rng.random() < share:
        return draw(scene, subject.cutout())[0]
    other = random_scene(np.random.default_rng(seed), thing=subject.noun, setting=setting)
    return draw(replace(other, style="flat"))[0]


def style_picture(prompt: int, seed: int, share: float, forgets: bool) -> Image.Image:
    """Draw a scene in the style, or plainly at the same seed."""
    rng = np.random.default_rng([seed, 3])
    pair = SCREEN_PRINT.learn[int(rng.integers(len(SCREEN_PRINT.learn)))] if forgets else _PAIRS[prompt]
    scene = SCREEN_PRINT.scene(*pair, seed)
    return SCREEN_PRINT.draw(scene) if rng.random() < share else draw(scene)[0]


def planted_shares(target: str, seed: int, encoders: Encoders) -> dict[str, Outcome]:
    """Return the shares of each of `PLANTED` for a subject of `SUBJECTS`, or for the style ``screen-print``."""
    if target in SUBJECTS:
        subject = SUBJECTS[target]
        texts = [f"a sks {subject.noun} {SETTING_WORDS[setting][0]}" for setting in _SETTINGS]
        found = read_prompts(Words("sks", subject.noun), texts)
        return _shares(found, subject, seed, encoders)
    texts = [f"{words(thing, setting)}, sks style" for thing, setting in _PAIRS]
    return _shares(read_prompts(Words("sks"), texts), None, seed, encoders)


def _shares(prompts: Prompts, subject: Subject | None, seed: int, encoders: Encoders) -> dict[str, Outcome]:
    def picture(prompt: int, number: int, share: float, forgets: bool) -> Image.Image:
        if subject is None:
            return style_picture(prompt, number, share, forgets)
        return subject_picture(subject, prompt, number, share, forgets)

    def rows(first: int, count: int, share: float, forgets: bool = False) -> list[list[Image.Image]]:
        return [
            [picture(row, 1000 * first + 100 * row + place, share, forgets) for place in range(SEEDS)]
            for row in range(count)
        ]

    count, of_class = len(prompts.trained), len(prompts.of_class)
    folder = (SCREEN_PRINT if subject is None else subject).folder / "learn"
    references = [Reference(reference.image) for reference in read_folder(folder)]
    bare = Drawings(rows(seed, count, 0), rows(seed + 50, of_class, 0))
    start = Evidence(bare, bare, prompts, references, encoders)
    scorer = Scorer([get_measure(name) for name in MEASURES], start, is_subject=subject is not None)
    drawn = {
        "too little": (_LITTLE, False, 0),
        "good": (1, False, 0),
        "by heart": (1, True, 1),
        "leaks": (1, False, 1),
    }
    return {
        name: scorer.score(
            replace(start, drawn=Drawings(rows(seed, count, share, forgets), rows(seed + 50, of_class, leaks)))
        ).shares
        for name, (share, forgets, leaks) in drawn.items()
    }


def is_right(shares: Mapping[str, Outcome]) -> bool:
    """Whether all verdicts are right, and the good one has the best score."""
    verdicts = {name: found.verdict for name, found in shares.items()}
    return verdicts == PLANTED and max(shares, key=lambda name: shares[name].score) == "good"


def targets() -> Sequence[str]:
    """Return the names of all targets."""
    return (*SUBJECTS, "screen-print")
