"""Class images for prior preservation: drawn by the base itself, once, and cached.

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
from diffgraft.generation.session import Session, default_batch_size
from diffgraft.generation.settings import DrawSettings

_MAX_BATCH = 4
"""Number of pictures in a batch at most"""


def class_images(
    base: Base, prompts: Sequence[str], each: int, settings: DrawSettings, seed: int
) -> list[tuple[str, Picture]]:
    """Return `each` pictures of every prompt, drawn by the base without adapters; those in the cache are reused.

    The batch size affects the last bits of a picture. Batches therefore always hold the same pictures, whatever is in
    the cache, so that an interrupted and continued drawing gives the same pictures as an uninterrupted one.

    Args:
        base: base that draws.
        prompts: prompts of the class.
        each: number of pictures of each prompt.
        settings: options for drawing.
        seed: seed of all pictures.

    Returns:
        The prompt and the picture, for each picture.
    """
    size = settings.size or (base.resolution, base.resolution)
    batch = min(_MAX_BATCH, default_batch_size(*size))
    settings = replace(settings, batch=batch)
    wanted = [(prompt, _folder(base, prompt, settings, seed), number) for prompt in prompts for number in range(each)]
    paths = [folder / f"{number:04d}.png" for _, folder, number in wanted]
    missing = {index for index, path in enumerate(paths) if not _is_readable(path, size)}
    unsaved: dict[int, bytes] = {}
    if missing:
        for prompt, folder in dict.fromkeys(wanted[index][:2] for index in missing):
            with optional_write():
                write_text(folder / "about.txt", f"class images: {prompt!r} by {base.name}, {settings}, seed {seed}\n")
        indices = _round_up_to_batches(missing, len(wanted), batch)

        def keep(number: int, image: Image.Image) -> None:
            if (index := indices[number]) in missing:
                missing.remove(index)
                image.save(png := BytesIO(), "PNG")
                with optional_write() as files:
                    with atomic_write(paths[index]) as file:
                        file.write_bytes(png.getvalue())
                    files.append(paths[index])  # only now, as a full disk may raise at the end of the block
                if not files:
                    unsaved[index] = png.getvalue()

        texts = [wanted[index][0] for index in indices]
        seeds = [seed * 100_003 % 2**31 + wanted[index][2] for index in indices]
        Session(base).draw_each(texts, seeds, settings, None, keep, "drawing class images")
    return [
        (
            prompt,
            Picture(
                f"class image {index}", partial(unsaved.__getitem__, index) if index in unsaved else path.read_bytes
            ),
        )
        for index, ((prompt, _, _), path) in enumerate(zip(wanted, paths, strict=True))
    ]


def _is_readable(path: Path, size: tuple[int, int]) -> bool:
    """Whether the cache has an undamaged picture of `size` at `path`."""
    try:
        if not path.is_file():  # opening a pipe would block
            return False
        with Image.open(path, formats=["PNG"]) as image:
            if image.size != size:  # before it is decoded
                return False
            image.load()
        return True
    except Exception:  # decoders raise many kinds of exceptions for damaged files
        return False


def _round_up_to_batches(missing: Set[int], count: int, size: int) -> list[int]:
    """Return the indices of all batches with a missing picture; the last batch repeats the last of `count` pictures."""
    starts = sorted({index // size * size for index in missing})
    return [min(index, count - 1) for start in starts for index in range(start, start + size)]


def _folder(base: Base, prompt: str, settings: DrawSettings, seed: int) -> Path:
    key = f"{base.generation_hash}{base.under} {prompt} {settings} {seed}"
    return cache_folder() / "class-images" / hashlib.sha256(key.encode()).hexdigest()[:20]
