"""Class images for prior preservation: drawn by the base itself, once, and kept.

DreamBooth (Ruiz et al. 2022, arXiv:2208.12242, section 3.3) supervises the model with its own pictures of the class.
"""

import hashlib
from collections.abc import Sequence, Set
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image

from diffgraft.bases import Base
from diffgraft.data.cache import optional_write
from diffgraft.data.pictures import Picture
from diffgraft.files import atomic_write, cache_folder, write_text
from diffgraft.generation.generate import Settings, default_batch_size, generate

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
    batch = min(_AT_ONCE, default_batch_size(*size))
    settings = replace(settings, batch=batch)
    wanted = [(prompt, _folder(base, prompt, settings, seed), number) for prompt in prompts for number in range(each)]
    paths = [folder / f"{number:04d}.png" for _, folder, number in wanted]
    missing = {place for place, path in enumerate(paths) if not _is_whole(path, size)}
    unsaved: dict[int, bytes] = {}
    if missing:
        for prompt, folder in dict.fromkeys((prompt, folder) for prompt, folder, _ in (wanted[at] for at in missing)):
            with optional_write():
                write_text(folder / "about.txt", f"class images: {prompt!r} by {base.name}, {settings}, seed {seed}\n")
        places = _whole_batches(missing, len(wanted), batch)

        def keep(number: int, image: Image.Image) -> None:
            if (place := places[number]) in missing:
                missing.remove(place)
                image.save(written := BytesIO(), "PNG")
                with optional_write() as done:
                    with atomic_write(paths[place]) as file:
                        file.write_bytes(written.getvalue())
                    done.append(paths[place])  # only now: the disk may be full up to the last moment
                if not done:
                    unsaved[place] = written.getvalue()

        texts = [wanted[place][0] for place in places]
        seeds = [seed * 100_003 % 2**31 + wanted[place][2] for place in places]
        generate(base.pipeline(), texts, settings, seeds, "drawing class images", keep)
    return [
        (
            prompt,
            Picture(
                f"class image {place}", partial(unsaved.__getitem__, place) if place in unsaved else path.read_bytes
            ),
        )
        for place, ((prompt, _, _), path) in enumerate(zip(wanted, paths, strict=True))
    ]


def _is_whole(path: Path, size: tuple[int, int]) -> bool:
    """Whether the cache has a picture of `size` that can be read to its end; a damaged one is drawn again."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with Image.open(path, formats=["PNG"]) as image:
            if image.size != size:  # before it is decoded
                return False
            image.load()
        return True
    except Exception:  # what the decoder stumbles over in a damaged file is of many kinds
        return False


def _whole_batches(missing: Set[int], count: int, size: int) -> list[int]:
    """Places of all batches that lack something; the last one is filled up with its own last picture."""
    starts = sorted({place // size * size for place in missing})
    return [min(place, count - 1) for start in starts for place in range(start, start + size)]


def _folder(base: Base, prompt: str, settings: Settings, seed: int) -> Path:
    said = f"{base.generation_hash} {prompt} {settings} {seed}"
    return cache_folder() / "class-images" / hashlib.sha256(said.encode()).hexdigest()[:20]
