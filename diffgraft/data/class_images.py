"""Class images for prior preservation: drawn by the base itself, once, and kept.

DreamBooth (Ruiz et al. 2022, arXiv:2208.12242, section 3.3) supervises the model with its own pictures of the class.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from diffgraft.bases import Base
from diffgraft.files import replacing, write_text
from diffgraft.generation.generate import Settings, generate


def cache_folder() -> Path:
    """Where pictures that can be made again are kept: ``DIFFGRAFT_CACHE``, or ``~/.cache/diffgraft``."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "diffgraft"
    return Path(os.environ.get("DIFFGRAFT_CACHE", default)).expanduser()


def class_images(
    base: Base, prompts: Sequence[str], each: int, settings: Settings, seed: int
) -> list[tuple[str, Image.Image]]:
    """`each` pictures of every prompt by the bare base, with their prompts; only those not in the cache are drawn."""
    wanted = [(prompt, _folder(base, prompt, settings, seed), number) for prompt in prompts for number in range(each)]
    paths = [folder / f"{number:04d}.png" for _, folder, number in wanted]
    missing = [place for place, path in enumerate(paths) if not path.exists()]
    if missing:
        for prompt, folder in dict.fromkeys((prompt, folder) for prompt, folder, _ in (wanted[at] for at in missing)):
            write_text(folder / "about.txt", f"class images: {prompt!r} by {base.name}, {settings}, seed {seed}\n")

        def keep(place: int, image: Image.Image) -> None:
            with replacing(paths[missing[place]]) as partial:
                image.save(partial)

        texts = [wanted[place][0] for place in missing]
        seeds = [seed * 100_003 % 2**31 + wanted[place][2] for place in missing]
        generate(base.pipeline(), texts, settings, seeds, "drawing class images", keep)
    images = []
    for (prompt, _, _), path in zip(wanted, paths, strict=True):
        with Image.open(path) as image:
            images.append((prompt, image.convert("RGB")))
    return images


def _folder(base: Base, prompt: str, settings: Settings, seed: int) -> Path:
    said = f"{base.drawing_hash} {prompt} {settings} {seed}"
    return cache_folder() / "class-images" / hashlib.sha256(said.encode()).hexdigest()[:20]
