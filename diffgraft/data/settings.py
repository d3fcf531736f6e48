"""Groups of settings about pictures and captions: buckets, masks, captions, tags."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from diffgraft.strict import Strict

FolderLayout = Literal["auto", "flat", "kohya"]
"""How a folder is read: by what it holds, as pictures that lie in it, or as numbered folders of them (`10_sks dog`)"""


class Buckets(Strict):
    """Aspect-ratio buckets: pictures keep about their shape, and those of one size make a batch."""

    use: bool = False
    """Whether pictures are sorted into sizes of about resolution² pixels, instead of cut to squares"""
    step: int | None = Field(None, ge=8, le=8192)
    """Pixels by which sides differ from one size to the next; unset: 64, or an eighth of smaller resolutions"""
    min: int | None = Field(None, ge=8, le=8192)
    """Shortest side of a bucket in pixels; unset: half the resolution"""
    max: int | None = Field(None, ge=8, le=8192)
    """Longest side of a bucket in pixels; unset: twice the resolution"""
    upscale: bool = True
    """Whether pictures smaller than their bucket are enlarged; if not, they make a bucket of their own size"""


class Masks(Strict):
    """Where a picture counts: white, or opaque, in its mask."""

    use: bool = False
    """Whether losses are weighted by `NAME_mask.png` beside each picture or, without one, by its alpha channel"""
    outside: float = Field(0.0, ge=0, le=1)
    """Weight of what the mask leaves out"""
    normalize: bool = True
    """Whether a picture's loss is the mean over its mask, so that small subjects count as much as large ones"""


class Captions(Strict):
    """What stands beside pictures; `captions=false` alone says that it is not used."""

    use: bool = True
    """Whether a picture's captions, in the `.txt` or `.caption` file beside it or in the folder's `metadata.jsonl` or
    `.csv`, replace the prompt"""
    lines: Literal["first", "random", "join"] = "first"
    """Of a caption of several lines the first, each of them in turn and at random, or all of them as one prompt"""

    @model_validator(mode="before")
    @classmethod
    def _whether_alone(cls, said: Any) -> Any:
        return said if isinstance(said, Mapping | Captions) else {"use": said}

    @model_serializer(mode="wrap")
    def _as_short_as_it_was(self, whole: SerializerFunctionWrapHandler) -> Any:
        """One word where nothing is said of lines, as in files of earlier releases."""
        return self.use if self.lines == "first" else whole(self)


class Tags(Strict):
    """Captions as lists of tags, changed each time they come round."""

    separator: str = Field(",", min_length=1)
    """What stands between tags"""
    shuffle: bool = False
    """Whether tags come in another order each time"""
    keep: int = Field(0, ge=0, le=1000)
    """So many at the front stay where they are, and are never dropped"""
    drop: float = Field(0.0, ge=0, lt=1)
    """Share of the other tags that is left out each time; one with the trigger in it never is"""
