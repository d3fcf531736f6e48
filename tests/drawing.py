"""Drawing in tests: a picture for each prompt and seed, by a session that keeps nothing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from diffgraft.generation.image_input import ImageInput
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings


def generate(
    target: Any,
    prompts: Sequence[str],
    settings: DrawSettings,
    seeds: Sequence[int],
    keep: Callable[[int, Image.Image], None] | None = None,
    image_input: ImageInput | None = None,
) -> list[Image.Image]:
    """Draw with a base, or with a pipeline of diffusers."""
    return Session(target).draw_each(prompts, seeds, settings, image_input, keep)


def draw_in(steps: int) -> None:
    """Let all sessions of this process draw in a few steps from now on."""
    plain = Session.draw_each

    def few(
        self: Session, prompts: Any, seeds: Any, settings: DrawSettings | None = None, *rest: Any, **named: Any
    ) -> Any:
        return plain(self, prompts, seeds, replace(settings or DrawSettings(), steps=steps), *rest, **named)

    Session.draw_each = few  # type: ignore[method-assign]
