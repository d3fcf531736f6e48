"""Pictures from data sets of the library `datasets`, saved to a folder or on the hub."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from diffgraft.data.hub import hub_reachable, offline
from diffgraft.data.pictures import Picture
from diffgraft.data.tables import find_caption_column, parse_captions
from diffgraft.errors import DiffgraftError


def from_data_set(where: str | Path, caption_column: str) -> list[Picture]:
    """Return all pictures of a data set, none of them decoded yet.

    Args:
        where: path of a saved data set, or id of one on the hub.
        caption_column: column with the captions; empty: text, caption, captions or prompt.

    Raises:
        DiffgraftError: the data set does not exist, or has no column of images.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets import Image as ImageFeature

    try:
        if isinstance(where, Path):
            data_set = load_from_disk(str(where))
        else:
            with nullcontext() if hub_reachable("dataset", where) else _offline():
                data_set = load_dataset(where)
    except Exception as error:  # the hub's client and the library raise what they will
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DiffgraftError(
            f"The data set {where} cannot be read: no folder of that name exists, and `datasets` reports: {lines[0]}"
        ) from error
    if isinstance(data_set, DatasetDict):
        data_set = data_set["train"] if "train" in data_set else next(iter(data_set.values()))
    assert isinstance(data_set, Dataset)
    images = [name for name, feature in data_set.features.items() if isinstance(feature, ImageFeature)]
    if not images:
        columns = ", ".join(data_set.column_names)
        raise DiffgraftError(f"The data set {where} has no column of images; its columns are: {columns}.")
    column = find_caption_column(data_set.column_names, caption_column, f"The data set {where}")
    rows = data_set.cast_column(images[0], ImageFeature(decode=False))

    def reader(number: int) -> Any:
        def read() -> bytes:
            cell = rows[number][images[0]]
            content: bytes = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
            return content

        return read

    cells = data_set[column] if column else [None] * len(data_set)
    captions = [
        parse_captions(value, f"The data set {where}, row {n}, column {column}") for n, value in enumerate(cells)
    ]
    return [Picture(f"row {n}", reader(n), captions[n]) for n in range(len(data_set))]


@contextmanager
def _offline() -> Iterator[None]:
    """Within the block the hub's client and the library `datasets`, which has its own setting, stay offline."""
    import datasets

    previous = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        with offline():
            yield
    finally:
        datasets.config.HF_HUB_OFFLINE = previous
