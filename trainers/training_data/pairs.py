"""Pairs of pictures: a folder beside pictures of one kind has one of the other kind, of the same name, for each.

Which kinds these are, such as preferred and rejected ones, the objective says (`PairKind`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from diffgraft.data.image_folder import read_folder
from diffgraft.data.inventory import list_names
from diffgraft.data.pictures import Picture
from diffgraft.data.tables import check_inside
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.objectives.objective import PairKind
from diffgraft.trainers.recipe.groups import DataSettings


def partner_folders(folders: Iterable[str], kind: PairKind) -> Iterator[Path]:
    """Yield the folders of partners in and below image folders."""
    for folder in folders:
        yield from Path(folder).expanduser().glob(f"**/{kind.other}")


def with_partners(concept: DataSettings, pictures: Sequence[Picture], kind: PairKind) -> list[Picture]:
    """Return the pictures of a concept, each with its partner.

    Raises:
        DiffgraftError: there is no folder of partners, a picture has no partner, or its size differs.
    """
    root = Path(concept.images).expanduser()
    folder = root / kind.other
    if not folder.is_dir():
        raise DiffgraftError(
            f"There are no pairs in {concept.images}: it has no folder {kind.other}. Make one with a {kind.other} "
            f"picture for each {kind.own} one, of the same name and size."
        )
    if not concept.outside:
        check_inside(root, folder, str(folder))
    read = {picture.name: picture for picture in read_folder(folder, thorough=False, outside=concept.outside)}
    names = [picture.name for picture in pictures]
    if alone := [name for name in names if name not in read]:
        raise DiffgraftError(
            f"{list_names(alone)} of {concept.images} has no {kind.other} picture: put one of the same name into "
            f"{folder}, or remove the {kind.own} one."
        )
    if alone := [name for name in read if name not in names]:
        raise DiffgraftError(
            f"{list_names(alone)} of {folder} has no {kind.own} picture: put one of the same name into "
            f"{concept.images}, or remove the {kind.other} one."
        )
    return [_paired(picture, read[picture.name], kind) for picture in pictures]


def _paired(picture: Picture, partner: Picture, kind: PairKind) -> Picture:
    """Return a picture with its partner; raises DiffgraftError if their sizes differ."""
    if picture.size != partner.size:
        sizes = ["x".join(map(str, one.size)) for one in (picture, partner)]
        raise DiffgraftError(
            f"{picture.name} is {sizes[0]}, but {kind.other}/{picture.name} is {sizes[1]}: the pictures of a pair need "
            "the same size, as they are cropped alike."
        )
    return replace(picture, partner=replace(partner, name=f"{kind.other}/{partner.name}"))
