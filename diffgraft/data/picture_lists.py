"""Pictures that a program hands over one by one become a folder, so that a run can go on with them later."""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffgraft.errors import DiffgraftError
from diffgraft.files import atomic_folder, cache_folder

KEY = "images"
"""The setting that may be a list of pictures"""


def save_picture_lists(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with a folder in the place of each list of pictures, also inside ``concepts`` and ``validation``.

    Raises:
        DiffgraftError: as `cached_picture_folder`.
    """
    found = dict(settings)
    if type(found.get(KEY)).__module__.partition(".")[0] in ("numpy", "torch", "PIL"):
        kind = type(found[KEY]).__name__
        raise DiffgraftError(f"Invalid images of type {kind}: must be a folder, or a list of paths and PIL pictures.")
    if isinstance(found.get(KEY), list | tuple):
        found[KEY] = str(cached_picture_folder(found[KEY]))
    if isinstance(found.get("concepts"), list):
        found["concepts"] = [save_picture_lists(one) if isinstance(one, Mapping) else one for one in found["concepts"]]
    if isinstance(found.get("validation"), Mapping):
        found["validation"] = save_picture_lists(found["validation"])
    return found


def cached_picture_folder(pictures: Sequence[Any]) -> Path:
    """A folder in the cache that holds `pictures`, made where it is not there: equal pictures are in the same one.

    Args:
        pictures: paths of picture files, which come along with the ``.txt`` beside them, and PIL's pictures, which
            are kept as PNG.

    Raises:
        DiffgraftError: there is none, a file is missing, or something is neither.
    """
    if not pictures:
        raise DiffgraftError("images is an empty list: at least one picture is needed.")
    files = [file for place, picture in enumerate(pictures) for file in _files(place, picture)]
    digest = hashlib.sha256(repr([(name, hashlib.sha256(content).hexdigest()) for name, content in files]).encode())
    folder = cache_folder() / "pictures" / digest.hexdigest()[:24]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as partial:
            for name, content in files:
                (partial / name).write_bytes(content)
    return folder


def _files(place: int, picture: Any) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files for a picture at its place in the list: itself, and its caption."""
    if isinstance(picture, Image.Image):
        content = io.BytesIO()
        image = picture if picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else picture.convert("RGB")
        image.save(content, "PNG")
        yield f"{place:05}.png", content.getvalue()
        return
    try:
        path = Path(picture).expanduser()
    except TypeError as error:
        kind = type(picture).__name__
        raise DiffgraftError(f"images holds a value of type {kind}, which is neither a path nor a picture.") from error
    if not path.is_file():
        raise DiffgraftError(f"There is no picture {path}.")
    yield f"{place:05}-{path.name}", path.read_bytes()
    if (caption := path.with_suffix(".txt")).is_file():
        yield f"{place:05}-{caption.name}", caption.read_bytes()
