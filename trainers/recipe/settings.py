"""Settings inside the groups of a recipe: prior preservation, concepts, validation, the loss."""

from typing import Literal

from pydantic import Field

from diffgraft.diffusion.settings import Loss as LossOfErrors
from diffgraft.strict import Strict


class Prior(Strict):
    """Prior preservation (DreamBooth, arXiv:2208.12242, equation 2)."""

    weight: float = Field(1.0, ge=0, le=1000)
    """Factor λ of the loss on class images; 0 turns prior preservation off"""
    images: int = Field(64, ge=1, le=100_000)
    """Class images drawn by the base (and kept in a cache)"""
    folder: str = ""
    """Folder with class images of your own, in the place of those that the base draws"""
    by: Literal["pictures", "prediction"] = "pictures"
    """What holds the class: pictures of it, or what the bare base says of the instance pictures as the class"""


class Concept(Strict):
    """One of several things learnt at once; what is unset is as in the recipe."""

    images: str = Field(..., min_length=1)
    """Its pictures"""
    trigger: str | None = None
    """The word that calls it"""
    subject: str | None = None
    """Its class noun"""
    prompt: str | None = None
    """Prompt of its pictures without a caption"""
    class_prompt: str | None = None
    """Prompt of its class images"""
    repeats: int | None = Field(None, ge=1, le=100_000)
    """How often each of its pictures comes in a round"""
    weight: float | None = Field(None, ge=0, le=1000)
    """Factor on the loss of its pictures"""
    prior: Prior | None = None
    """Its own prior preservation"""


class Validation(Strict):
    """Pictures that are never learnt from, and what their loss decides."""

    images: str = ""
    """Folder of pictures to validate with"""
    share: float = Field(0.0, ge=0, lt=1)
    """Share of the pictures that is held out in place of such a folder, the same ones in every run"""
    every: int = Field(50, ge=1)
    """Steps from one validation to the next"""
    pairs: int = Field(64, ge=1, le=10_000)
    """Pairs of timestep and noise, the same ones in every run"""
    patience: int = Field(0, ge=0)
    """Validations without a new best after which training ends; 0: it goes on"""

    @property
    def is_on(self) -> bool:
        return bool(self.images) or self.share > 0


class Loss(LossOfErrors):
    """What the loss is, and how errors are counted."""

    objective: str = ""
    """What the loss is made of: captioned, dreambooth, prior-prediction, or an objective of an outside package; unset:
    what the task and its prior preservation ask for"""
