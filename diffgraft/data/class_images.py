"""Class images for prior preservation: drawn by the base itself, once, and kept.

DreamBooth (Ruiz et al. 2022, arXiv:2208.12242, section 3.3) supervises the model with its own pictures of the class.
"""

import hashlib
import os
from pathlib import Path

from PIL import Image

from diffgraft.bases import Base
from diffgraft.files import replacing, write_text
from diffgraft.generation.generate import Settings, generate


def cache_folder() -> Path:
    """Where pictures that can be made again are kept: ``DIFFGRAFT_CACHE``, or ``~/.cache/diffgraft``."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "diffgraft"
    return Path(os.environ.get("DIFFGRAFT_CACHE", default)).expanduser()


def class_images(base: Base, prompt: str, count: int, settings: Settings, seed: int) -> list[Image.Image]:
    """`count` pictures of `prompt` by the bare base; only those that are not yet in the cache are drawn."""
    said = f"{base.drawing_hash} {prompt} {settings} {seed}"
    folder = cache_folder() / "class-images" / hashlib.sha256(said.encode()).hexdigest()[:20]
    paths = [folder / f"{number:04d}.png" for number in range(count)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if missing:
        write_text(folder / "about.txt", f"class images: {prompt!r} by {base.name}, {settings}, seed {seed}\n")

        def keep(place: int, image: Image.Image) -> None:
            with replacing(paths[missing[place]]) as partial:
                image.save(partial)

        seeds = [seed * 100_003 % 2**31 + number for number in missing]
        generate(base.pipeline(), [prompt] * len(missing), settings, seeds, f"drawing class images, {prompt!r}", keep)
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return images
