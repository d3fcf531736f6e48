"""Pictures as the VAE's latents, encoded once and kept."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffgraft.bases import Base
from diffgraft.data.cache import read_tensors, write_tensors
from diffgraft.data.frames import Frame
from diffgraft.data.image_folder import warn_left_out
from diffgraft.data.pictures import Picture, UnreadablePictureError, square, to_tensor
from diffgraft.files import cache_folder
from diffgraft.progress import track
from diffgraft.third_party import quiet_libraries

_IN_MEMORY = 2**31
"""Bytes of latents that are held; what is more is read from its file each time"""
_VERSION = "latents 1"
Distribution = tuple[Tensor, Tensor]
"""Mean and standard deviation, [c, h, w] each, scaled as the UNet expects"""


class Latents:
    """What the VAE says of n pictures: a normal distribution each, which may differ in size."""

    def __init__(self, of_pictures: Sequence[Distribution | Path]) -> None:
        self._of_pictures = of_pictures

    def __len__(self) -> int:
        return len(self._of_pictures)

    def __getitem__(self, row: int) -> Distribution:
        found = self._of_pictures[row]
        if not isinstance(found, Path):
            return found
        kept = _read(found)
        if kept is None:
            raise OSError(0, "The cache of latents was damaged while it was in use; start again", str(found))
        return kept

    def shape(self, row: int) -> tuple[int, ...]:
        """[c, h, w] of one."""
        return tuple(self[row][0].shape)

    def sample(self, rows: Sequence[int], noise: Tensor) -> Tensor:
        """Latents [len(rows), c, h, w] for standard normal `noise` of that shape, where that is."""
        means, stds = zip(*(self[row] for row in rows), strict=True)
        return torch.stack(means).to(noise.device) + torch.stack(stds).to(noise.device) * noise


@torch.no_grad()
def encode(base: Base, images: Sequence[Image.Image], side: int, title: str = "encoding pictures") -> Latents:
    """Latents of `images`, each cut to a square of `side` pixels first."""
    with _encoder(base) as distribution:
        return Latents([distribution(square(image, side)) for image in track(images, title, min_items=2)])


@dataclass(frozen=True)
class Encoded:
    """Pictures in their frames: one row a frame, those of a picture beside one another."""

    latents: Latents
    frames: Sequence[Frame]
    masks: Sequence[Tensor | None]
    """Where each counts, [h, w] in 0..1"""
    rows: Mapping[int, range]
    """Place of a picture in the list → its rows; without those that could not be opened"""


@torch.no_grad()
def encode_cached(
    base: Base,
    pictures: Sequence[Picture],
    ways: Sequence[Sequence[Frame]],
    *,
    masked: bool = False,
    keep: bool = True,
    title: str = "encoding pictures",
) -> Encoded:
    """Latents of each picture in each of its frames; if `keep`, those in the cache are taken from there.

    The cache knows them by the picture's content, its frame, and the VAE: what has changed is encoded anew, and so is
    what cannot be read or is not what was written. A picture that cannot be opened is named in a warning and left out.
    """
    of_vae = f"{base.vae_hash} {base.device.type}" if keep else ""
    found: list[Distribution | Path] = []
    frames: list[Frame] = []
    masks: list[Tensor | None] = []
    rows: dict[int, range] = {}
    held = 0
    with _encoder(base) as distribution:
        pairs = list(zip(pictures, ways, strict=True))
        for place, (picture, own) in enumerate(track(pairs, title, min_items=2)):
            files = [_file(picture, frame, of_vae) for frame in own]
            kept = [_read(file) if keep else None for file in files]
            is_kept = True
            if None in kept:
                try:
                    image = picture.image
                except UnreadablePictureError as error:
                    warn_left_out(error)
                    continue
                for number, frame in enumerate(own):
                    if kept[number] is None:
                        kept[number] = fresh = distribution(frame.crop(image))
                        if keep:
                            mean, std = fresh
                            is_kept = write_tensors(files[number], {"mean": mean, "std": std}, picture.name) and is_kept
            mask = picture.mask() if masked else None
            rows[place] = range(len(found), len(found) + len(own))
            for file, now, frame in zip(files, kept, own, strict=True):
                assert now is not None
                held += sum(value.nbytes for value in now)
                found.append(file if keep and is_kept and held > _IN_MEMORY else now)
                masks.append(None if mask is None else _small(frame.crop(mask), now[0].shape[-2:]))
            frames += own
    return Encoded(Latents(found), frames, masks, rows)


@contextmanager
def _encoder(base: Base) -> Iterator[Any]:
    """A function from an image to its distribution; some VAEs overflow in half precision, so it runs in float32."""
    stored, scale = base.vae.dtype, base.latents.scale
    is_ready = False

    def distribution(image: Image.Image) -> Distribution:
        nonlocal is_ready
        if not is_ready:
            with quiet_libraries():
                base.vae.to(torch.float32)  # casting there and back changes no bit
            is_ready = True
        told = base.vae.encode(to_tensor([image]).to(base.vae.device)).latent_dist
        mean, std = base.scaled(told.mean[0].float()).cpu(), (told.std[0].float() * scale).cpu()
        return mean, std

    try:
        yield distribution
    finally:
        with quiet_libraries():
            base.vae.to(stored)


def _file(picture: Picture, frame: Frame, of_vae: str) -> Path:
    if not of_vae:
        return Path()
    name = hashlib.sha256(f"{_VERSION} {picture.content} {frame} {of_vae}".encode()).hexdigest()
    return cache_folder() / "latents" / name[:2] / f"{name}.safetensors"


def _read(file: Path) -> Distribution | None:
    """What a file of the cache holds; None where there is none, or it is not what was written."""
    tensors = read_tensors(file)
    return (tensors["mean"], tensors["std"]) if tensors is not None and tensors.keys() == {"mean", "std"} else None


def _small(mask: Image.Image, size: Sequence[int]) -> Tensor:
    """A mask as [h, w] in 0..1, the mean over what each latent stands for."""
    shown = to_tensor([mask.convert("RGB")])[:, :1] / 2 + 0.5
    return F.adaptive_avg_pool2d(shown, (size[0], size[1]))[0, 0]
