"""Latents of pictures, encoded by the VAE once and cached."""

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
from diffgraft.data.frames import Crop
from diffgraft.data.image_folder import warn_left_out
from diffgraft.data.pictures import Picture, UnreadablePictureError, crop_to_square
from diffgraft.files import cache_folder
from diffgraft.pixels import to_tensor
from diffgraft.progress import track
from diffgraft.third_party import quiet_libraries

_IN_MEMORY = 2**31
"""Bytes of latents that are held in memory; further ones are read from their files each time"""
_VERSION = "latents 1"
Distribution = tuple[Tensor, Tensor]
"""Mean and standard deviation of a picture's latents, [c, h, w] each, scaled as the denoiser expects"""


class Latents:
    """The VAE's posteriors of n pictures: a normal distribution for each, which may differ in size."""

    def __init__(self, distributions: Sequence[Distribution | Path]) -> None:
        """Hold a distribution for each picture, or the path of the file that it is read from."""
        self._distributions = distributions

    def __len__(self) -> int:
        return len(self._distributions)

    def __getitem__(self, row: int) -> Distribution:
        item = self._distributions[row]
        if not isinstance(item, Path):
            return item
        distribution = _read(item)
        if distribution is None:
            raise OSError(0, "The cache of latents was damaged while it was in use; start again", str(item))
        return distribution

    def shape(self, row: int) -> tuple[int, ...]:
        """Return the shape [c, h, w] of the latents of a row."""
        return tuple(self[row][0].shape)

    def sample(self, rows: Sequence[int], noise: Tensor) -> Tensor:
        """Sample latents of n rows with standard normal `noise`, both [n, c, h, w], on the device of `noise`."""
        means, stds = zip(*(self[row] for row in rows), strict=True)
        return torch.stack(means).to(noise.device) + torch.stack(stds).to(noise.device) * noise


@torch.no_grad()
def encode(base: Base, images: Sequence[Image.Image], side: int, title: str = "encoding pictures") -> Latents:
    """Encode images to latents, each cropped to a square of `side` pixels; `title` names the phase of progress."""
    with _encoder(base) as distribution:
        return Latents([distribution(crop_to_square(image, side)) for image in track(images, title, min_items=2)])


@dataclass(frozen=True)
class Encoded:
    """Encoded pictures: a row for each frame (a crop of a picture, perhaps mirrored), picture after picture."""

    latents: Latents
    frames: Sequence[Crop]
    """Crop of each row"""
    masks: Sequence[Tensor | None]
    """Mask of each row, [h, w] with values from 0 to 1; None without a mask"""
    rows: Mapping[int, range]
    """Index of a picture → its rows; pictures that could not be opened are missing"""


@torch.no_grad()
def encode_pictures(
    base: Base,
    pictures: Sequence[Picture],
    frames_of: Sequence[Sequence[Crop]],
    *,
    masked: bool = False,
    keep: bool = True,
    title: str = "encoding pictures",
) -> Encoded:
    """Encode each picture in each of its frames, reading from the cache what it has.

    Entries of the cache are found by the picture's content, the frame and the VAE; what has changed or is damaged is
    encoded anew. Pictures that cannot be opened are left out with a warning.

    Args:
        base: base whose VAE encodes.
        pictures: pictures to encode.
        frames_of: frames of each picture.
        masked: whether to return masks.
        keep: whether to use the cache on disk.
        title: name of the phase under which progress is reported.
    """
    of_vae = f"{base.vae_hash} {base.device.type}" if keep else ""
    distributions: list[Distribution | Path] = []
    frames: list[Crop] = []
    masks: list[Tensor | None] = []
    rows: dict[int, range] = {}
    size = 0
    with _encoder(base) as distribution:
        pairs = list(zip(pictures, frames_of, strict=True))
        for index, (picture, own_frames) in enumerate(track(pairs, title, min_items=2)):
            files = [_file(picture, frame, of_vae) for frame in own_frames]
            encoded = [_read(file) if keep else None for file in files]
            is_cached = True
            if None in encoded:
                try:
                    image = picture.image
                except UnreadablePictureError as error:
                    warn_left_out(error)
                    continue
                for number, frame in enumerate(own_frames):
                    if encoded[number] is None:
                        encoded[number] = fresh = distribution(frame.crop(image))
                        if keep:
                            mean, std = fresh
                            is_written = write_tensors(files[number], {"mean": mean, "std": std}, picture.name)
                            is_cached = is_written and is_cached
            mask = picture.mask() if masked else None
            rows[index] = range(len(distributions), len(distributions) + len(own_frames))
            for file, item, frame in zip(files, encoded, own_frames, strict=True):
                assert item is not None
                size += sum(value.nbytes for value in item)
                distributions.append(file if keep and is_cached and size > _IN_MEMORY else item)
                masks.append(None if mask is None else _latent_mask(frame.crop(mask), item[0].shape[-2:]))
            frames += own_frames
    return Encoded(Latents(distributions), frames, masks, rows)


@contextmanager
def _encoder(base: Base) -> Iterator[Any]:
    """Yield a function from an image to its distribution; the VAE runs in float32, as some overflow in float16."""
    original_dtype = base.vae.dtype
    is_ready = False

    def distribution(image: Image.Image) -> Distribution:
        nonlocal is_ready
        if not is_ready:
            with quiet_libraries():
                base.vae.to(torch.float32)  # casting to float32 and back changes no bit
            is_ready = True
        mean, std = base.family.posterior(base, to_tensor([image]))
        return mean[0].cpu(), std[0].cpu()

    try:
        yield distribution
    finally:
        with quiet_libraries():
            base.vae.to(original_dtype)


def _file(picture: Picture, frame: Crop, of_vae: str) -> Path:
    if not of_vae:
        return Path()
    name = hashlib.sha256(f"{_VERSION} {picture.content} {frame} {of_vae}".encode()).hexdigest()
    return cache_folder() / "latents" / name[:2] / f"{name}.safetensors"


def _read(file: Path) -> Distribution | None:
    """Read a distribution from a file of the cache; None if the file does not exist or is damaged."""
    tensors = read_tensors(file)
    return (tensors["mean"], tensors["std"]) if tensors is not None and tensors.keys() == {"mean", "std"} else None


def _latent_mask(mask: Image.Image, size: Sequence[int]) -> Tensor:
    """Downscale a mask to the latents' size [h, w], by averaging; values are from 0 to 1."""
    values = to_tensor([mask.convert("RGB")])[:, :1] / 2 + 0.5
    return F.adaptive_avg_pool2d(values, (size[0], size[1]))[0, 0]
