"""Drawing for an evaluation: adapters at strengths, with the same prompts and seeds, and nothing twice."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffgraft.data.pictures import UnreadablePictureError, read_picture
from diffgraft.evaluation.candidates import Candidate
from diffgraft.evaluation.evidence import Drawings, Prompts, Rows
from diffgraft.generation.metadata import loading_of, save_drawing
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings

_NAME = "evaluated"
"""Name under which an adapter is in use in the session"""
_VERSION = 1
"""Number in the keys of kept pictures; to be raised when the same key gives other pictures"""


@dataclass(eq=False)
class Artist:
    """Draws pictures of adapters in a session, and keeps each in a folder, under a hash of all that it depends on."""

    session: Session
    folder: Path
    seeds: Sequence[int]
    settings: DrawSettings
    drawn: int = 0
    """Number of pictures drawn so far"""
    kept: int = 0
    """Number of pictures that were found in the folder"""

    def __post_init__(self) -> None:
        """Compute what all keys have in common."""
        base = self.session.base
        self._common: dict[str, Any] = {
            "version": _VERSION,
            "base": base.generation_hash,
            "loading": loading_of(base, self.session.painter.device),
            "settings": self.settings.changed(),
        }

    def missing(self, prompts: Sequence[str], candidate: Candidate | None, strength: float) -> int:
        """Return how many pictures of an adapter at a strength are still to be drawn."""
        return sum(not self._file(prompt, seed, candidate, strength).is_file() for prompt, seed in self._pairs(prompts))

    def draw(self, prompts: Prompts, candidate: Candidate | None, strength: float) -> Drawings:
        """Return the pictures of an adapter at a strength; of the base alone without a candidate.

        Raises:
            DiffgraftError: the adapter does not fit the base.
        """
        trained = prompts.plain if candidate is None else prompts.trained
        texts = list(dict.fromkeys([*trained, *prompts.of_class]))
        rows = dict(zip(texts, self._rows(texts, candidate, strength), strict=True))
        return Drawings([rows[text] for text in trained], [rows[text] for text in prompts.of_class])

    def _rows(self, prompts: Sequence[str], candidate: Candidate | None, strength: float) -> Rows:
        """Return the pictures of each prompt by seed; those that are kept are read."""
        found: dict[tuple[str, int], Image.Image] = {}
        for prompt, seed in self._pairs(prompts):
            file = self._file(prompt, seed, candidate, strength)
            if file.is_file():
                try:
                    found[prompt, seed] = read_picture(file)
                except UnreadablePictureError:  # it is drawn again
                    file.unlink(missing_ok=True)
        self.kept += len(found)
        todo = [pair for pair in self._pairs(prompts) if pair not in found]
        if todo:
            self.folder.mkdir(parents=True, exist_ok=True)

            def keep(place: int, image: Image.Image) -> None:
                save_drawing(image, self._file(*todo[place], candidate, strength))

            with self.session.restored():
                if candidate is not None:
                    self.session.use(candidate.adapter, strength, _NAME)
                title = "the base alone" if candidate is None else f"{candidate.name} at {strength:g}"
                drawn = self.session.draw_each(
                    [prompt for prompt, _ in todo], [seed for _, seed in todo], self.settings, None, keep, title
                )
            found |= dict(zip(todo, drawn, strict=True))
            self.drawn += len(todo)
        return [[found[prompt, seed] for seed in self.seeds] for prompt in prompts]

    def _pairs(self, prompts: Sequence[str]) -> list[tuple[str, int]]:
        return [(prompt, seed) for prompt in prompts for seed in self.seeds]

    def _file(self, prompt: str, seed: int, candidate: Candidate | None, strength: float) -> Path:
        """Return the path of a picture, whose name is a hash of all that it depends on."""
        adapter = {} if candidate is None or strength == 0 else {"adapter": candidate.hash, "strength": strength}
        key = json.dumps({**self._common, **adapter, "prompt": prompt, "seed": seed}, sort_keys=True, default=str)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.png"
