"""Pictures of data sets that the library `datasets` reads: saved to a folder, or on the hub."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from diffgraft.data.hub import answers, offline
from diffgraft.data.pictures import Picture
from diffgraft.data.tables import find_caption_column, parse_captions
from diffgraft.errors import DiffgraftError


def from_data_set(where: str | Path, caption_column: str) -> list[Picture]:
    """All pictures of a data set, a folder's as a path and one of the hub as its id, not looked at yet.

    Raises:
        DiffgraftError: there is no such data set, or it has no column of images.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets import Image as ImageFeature

    try:
        if isinstance(where, Path):
            found = load_from_disk(str(where))
        else:
            with nullcontext() if answers("dataset", where) else _offline():
                found = load_dataset(where)
    except Exception as error:  # the hub's client and the library raise what they will
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DiffgraftError(
            f"The data set {where} cannot be read: no folder of that name exists here, and `datasets` said: {lines[0]}"
        ) from error
    if isinstance(found, DatasetDict):
        found = found["train"] if "train" in found else next(iter(found.values()))
    assert isinstance(found, Dataset)
    images = [name for name, feature in found.features.items() if isinstance(feature, ImageFeature)]
    if not images:
        raise DiffgraftError(f"The data set {where} has no column of images, but: {', '.join(found.column_names)}.")
    column = find_caption_column(found.column_names, caption_column, f"The data set {where}")
    rows = found.cast_column(images[0], ImageFeature(decode=False))

    def reader(number: int) -> Any:
        def read() -> bytes:
            cell = rows[number][images[0]]
            content: bytes = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
            return content

        return read

    said = found[column] if column else [None] * len(found)
    captions = [
        parse_captions(value, f"The data set {where}, row {n}, column {column}") for n, value in enumerate(said)
    ]
    return [Picture(f"row {n}", reader(n), captions[n]) for n in range(len(found))]


@contextmanager
def _offline() -> Iterator[None]:
    """`offline`, of the library `datasets` as well, which has a switch of its own."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        with offline():
            yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
