"""Pairs of pictures: the folder `rejected`, beside preferred pictures, has a worse one of the same name for each."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from diffgraft.data.image_folder import read_folder
from diffgraft.data.inventory import list_names
from diffgraft.data.pictures import Picture
from diffgraft.data.tables import check_inside
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.groups import DataSettings

REJECTED = "rejected"
"""Name of the folder with the rejected pictures"""


def rejected_folders(folders: Iterable[str]) -> Iterator[Path]:
    """Yield the folders of rejected pictures in and below image folders."""
    for folder in folders:
        yield from Path(folder).expanduser().glob(f"**/{REJECTED}")


def with_rejected(concept: DataSettings, pictures: Sequence[Picture]) -> list[Picture]:
    """Return the preferred pictures of a concept, each with the rejected picture of its pair.

    Raises:
        DiffgraftError: there is no folder of rejected pictures, a picture has no partner, or its size differs.
    """
    root = Path(concept.images).expanduser()
    folder = root / REJECTED
    if not folder.is_dir():
        raise DiffgraftError(
            f"There are no pairs in {concept.images}: it has no folder {REJECTED}. Make one with a rejected picture "
            "for each preferred one, of the same name and size."
        )
    if not concept.outside:
        check_inside(root, folder, str(folder))
    read = {picture.name: picture for picture in read_folder(folder, thorough=False, outside=concept.outside)}
    names = [picture.name for picture in pictures]
    if alone := [name for name in names if name not in read]:
        raise DiffgraftError(
            f"{list_names(alone)} of {concept.images} has no rejected picture: put one of the same name into {folder}, "
            "or remove the preferred one."
        )
    if alone := [name for name in read if name not in names]:
        raise DiffgraftError(
            f"{list_names(alone)} of {folder} has no preferred picture: put one of the same name into "
            f"{concept.images}, or remove the rejected one."
        )
    return [_paired(picture, read[picture.name]) for picture in pictures]


def _paired(picture: Picture, rejected: Picture) -> Picture:
    """Return a preferred picture with its rejected one; raises DiffgraftError if their sizes differ."""
    if picture.size != rejected.size:
        sizes = ["x".join(map(str, one.size)) for one in (picture, rejected)]
        raise DiffgraftError(
            f"{picture.name} is {sizes[0]}, but {REJECTED}/{picture.name} is {sizes[1]}: the pictures of a pair need "
            "the same size, as they are cropped alike."
        )
    return replace(picture, rejected=replace(rejected, name=f"{REJECTED}/{rejected.name}"))
