"""Lists of pictures in settings: saved to a folder of the cache, so that a resumed run finds them again."""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffgraft.errors import DiffgraftError
from diffgraft.files import atomic_folder, cache_folder

KEY = "images"
"""Setting that may be a list of pictures"""


def save_picture_lists(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replace each list of pictures in `settings`, also in ``concepts`` and ``validation``, by a folder with them.

    Raises:
        DiffgraftError: a list is empty, a file is missing, or an item is neither a path nor a picture.
    """
    replaced = dict(settings)
    if type(replaced.get(KEY)).__module__.partition(".")[0] in ("numpy", "torch", "PIL"):
        kind = type(replaced[KEY]).__name__
        raise DiffgraftError(f"Invalid images of type {kind}: must be a folder, or a list of paths and PIL images.")
    if isinstance(replaced.get(KEY), list | tuple):
        replaced[KEY] = str(cached_picture_folder(replaced[KEY]))
    if isinstance(replaced.get("concepts"), list):
        replaced["concepts"] = [
            save_picture_lists(concept) if isinstance(concept, Mapping) else concept for concept in replaced["concepts"]
        ]
    if isinstance(replaced.get("validation"), Mapping):
        replaced["validation"] = save_picture_lists(replaced["validation"])
    return replaced


def cached_picture_folder(pictures: Sequence[Any]) -> Path:
    """Return a folder of the cache that holds `pictures`, and create it if needed; equal lists have the same folder.

    Args:
        pictures: paths of picture files, which are copied with the ``.txt`` beside them, and PIL images, which are
            saved as PNG.

    Raises:
        DiffgraftError: the list is empty, a file is missing, or an item is neither a path nor a picture.
    """
    if not pictures:
        raise DiffgraftError("Invalid images: the list is empty; give at least one picture.")
    files = [file for index, picture in enumerate(pictures) for file in _files(index, picture)]
    digest = hashlib.sha256(repr([(name, hashlib.sha256(content).hexdigest()) for name, content in files]).encode())
    folder = cache_folder() / "pictures" / digest.hexdigest()[:24]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as partial:
            for name, content in files:
                (partial / name).write_bytes(content)
    return folder


def _files(index: int, picture: Any) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files for a picture of the list: the picture, and its caption if there is one."""
    if isinstance(picture, Image.Image):
        content = io.BytesIO()
        image = picture if picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else picture.convert("RGB")
        image.save(content, "PNG")
        yield f"{index:05}.png", content.getvalue()
        return
    try:
        path = Path(picture).expanduser()
    except TypeError as error:
        kind = type(picture).__name__
        raise DiffgraftError(f"Invalid item of images of type {kind}: must be a path or a PIL image.") from error
    if not path.is_file():
        raise DiffgraftError(f"The picture {path} does not exist.")
    yield f"{index:05}-{path.name}", path.read_bytes()
    if (caption := path.with_suffix(".txt")).is_file():
        yield f"{index:05}-{caption.name}", caption.read_bytes()
