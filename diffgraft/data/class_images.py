"""Class images for prior preservation: drawn by the base itself, once, and kept.

DreamBooth (Ruiz et al. 2022, arXiv:2208.12242, section 3.3) supervises the model with its own pictures of the class.
"""

import hashlib
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

from PIL import Image

from diffgraft.bases import Base
from diffgraft.data.pictures import Picture, read_picture
from diffgraft.errors import DiffgraftError
from diffgraft.files import cache_folder, replacing, write_text
from diffgraft.generation.generate import Settings, at_once, generate

_AT_ONCE = 4
"""Pictures in a batch, at most"""


def class_images(
    base: Base, prompts: Sequence[str], each: int, settings: Settings, seed: int
) -> list[tuple[str, Picture]]:
    """`each` pictures of every prompt by the bare base, with their prompts; only those not in the cache are drawn.

    How many are drawn at once decides their last bits. So batches are as large and hold the same whatever the cache
    has of them, and an interrupted drawing leaves the same pictures as one that never was.
    """
    size = settings.size or (base.resolution, base.resolution)
    batch = min(_AT_ONCE, at_once(*size))
    settings = replace(settings, batch=batch)
    wanted = [(prompt, _folder(base, prompt, settings, seed), number) for prompt in prompts for number in range(each)]
    paths = [folder / f"{number:04d}.png" for _, folder, number in wanted]
    missing = {place for place, path in enumerate(paths) if not _is_whole(path)}
    if missing:
        for prompt, folder in dict.fromkeys((prompt, folder) for prompt, folder, _ in (wanted[at] for at in missing)):
            write_text(folder / "about.txt", f"class images: {prompt!r} by {base.name}, {settings}, seed {seed}\n")
        places = _whole_batches(missing, len(wanted), batch)

        def keep(number: int, image: Image.Image) -> None:
            if (place := places[number]) in missing:
                missing.remove(place)
                with replacing(paths[place]) as partial:
                    image.save(partial)

        texts = [wanted[place][0] for place in places]
        seeds = [seed * 100_003 % 2**31 + wanted[place][2] for place in places]
        generate(base.pipeline(), texts, settings, seeds, "drawing class images", keep)
    names = [f"class image {number}" for number in range(len(paths))]
    return [
        (prompt, Picture(name, path.read_bytes))
        for name, (prompt, _, _), path in zip(names, wanted, paths, strict=True)
    ]


def _is_whole(path: Path) -> bool:
    """Whether a class image is in the cache, and can be opened: a damaged one is drawn anew."""
    try:
        return path.is_file() and read_picture(path).size > (0, 0)
    except DiffgraftError:
        return False


def _whole_batches(missing: Set[int], count: int, size: int) -> list[int]:
    """Places of all batches that lack something; the last one is filled up with its own last picture."""
    starts = sorted({place // size * size for place in missing})
    return [min(place, count - 1) for start in starts for place in range(start, start + size)]


def _folder(base: Base, prompt: str, settings: Settings, seed: int) -> Path:
    said = f"{base.drawing_hash} {prompt} {settings} {seed}"
    return cache_folder() / "class-images" / hashlib.sha256(said.encode()).hexdigest()[:20]
