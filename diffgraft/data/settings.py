"""Groups of recipe settings for images and captions: buckets, masks, condition pictures, captions, tags."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from diffgraft.strict import Strict

FolderLayout = Literal["auto", "flat", "kohya"]
"""How a folder is read: detected from its content, as a flat folder of images, or as numbered subfolders of images
as kohya's tools have them (`10_sks dog`)"""


class Buckets(Strict):
    """Aspect-ratio buckets: images about keep their shape, and a batch holds images of one size."""

    use: bool = False
    """Whether images are resized to buckets of about resolution² pixels, instead of cropped to squares"""
    step: int | None = Field(None, ge=8, le=8192)
    """Step in pixels between the sides of buckets; unset: 64, or an eighth of resolutions below 512"""
    min: int | None = Field(None, ge=8, le=8192)
    """Shortest side of a bucket in pixels; unset: half the resolution"""
    max: int | None = Field(None, ge=8, le=8192)
    """Longest side of a bucket in pixels; unset: twice the resolution"""
    upscale: bool = True
    """Whether images smaller than their bucket are enlarged; if not, they get a bucket of their own size"""


class Masks(Strict):
    """Masks, which weight the loss over an image: white or opaque counts, black or transparent does not."""

    use: bool = False
    """Whether the loss is weighted by `NAME_mask.png` beside each image or, without one, by its alpha channel"""
    outside: float = Field(0.0, ge=0, le=1)
    """Weight of the loss outside the mask, 0 to 1"""
    normalize: bool = True
    """Whether an image's loss is averaged over its mask, so that small subjects count as much as large ones"""


class Conditions(Strict):
    """Condition pictures, by which a control network learns to steer."""

    by: Literal["edges"] = "edges"
    """What the condition picture of an image is made of: its edges"""
    images: str = ""
    """Folder of condition pictures of your own (depth, poses, sketches …), which are used instead of edges: for each
    image one of the same name, with any suffix"""


class Captions(Strict):
    """Captions of images; `captions=false` turns them off."""

    use: bool = True
    """Whether captions replace the prompt; they are read from the `.txt` or `.caption` file beside an image, or from
    the folder's `metadata.jsonl` or `metadata.csv`"""
    lines: Literal["first", "random", "join"] = "first"
    """Which lines of a caption are used: the first, all of them in turn in random order, or all joined to one prompt"""

    @model_validator(mode="before")
    @classmethod
    def _from_flag(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping | Captions) else {"use": value}

    @model_serializer(mode="wrap")
    def _to_flag(self, serialize: SerializerFunctionWrapHandler) -> Any:
        """Return `use` alone if `lines` has its default, as in files of earlier releases."""
        return self.use if self.lines == "first" else serialize(self)


class Tags(Strict):
    """Captions as lists of tags, which are shuffled and dropped anew for each sample."""

    separator: str = Field(",", min_length=1)
    """Separator between tags"""
    shuffle: bool = False
    """Whether tags are shuffled for each sample"""
    keep: int = Field(0, ge=0, le=1000)
    """Number of tags at the front that are never moved or dropped"""
    drop: float = Field(0.0, ge=0, lt=1)
    """Probability that each of the other tags is dropped; tags that contain the trigger never are"""
