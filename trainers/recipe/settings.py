"""Nested settings of a recipe: prior preservation, concepts, validation, the loss."""

from typing import Any, Literal

from pydantic import Field

from diffgraft.diffusion.settings import Loss as LossOfErrors
from diffgraft.strict import Strict


class Prior(Strict):
    """Prior preservation (DreamBooth, arXiv:2208.12242, equation 2)."""

    weight: float = Field(1.0, ge=0, le=1000)
    """Weight λ of the loss on class images; 0 turns prior preservation off"""
    images: int = Field(64, ge=1, le=100_000)
    """Number of class images that the base generates (they are cached)"""
    prompts: list[str] = Field(default_factory=list)
    """Prompts of the class, such as "{class_prompt} in the snow"; {class_prompt} and {subject} are filled in; unset:
    the class prompt itself"""
    folder: str = ""
    """Folder of your own class images, used instead of generated ones"""
    by: Literal["pictures", "prediction"] = "pictures"
    """What preserves the class: pictures of it, or the prediction of the base without the adapter for your own images
    under the class prompt"""


class Concept(Strict):
    """One of several concepts learned at once; unset keys are those of the recipe."""

    images: str = Field(..., min_length=1)
    """Images of the concept"""
    trigger: str | None = None
    """Word that calls the concept"""
    subject: str | None = None
    """Class noun of the concept"""
    prompt: str | None = None
    """Prompt of images without a caption"""
    class_prompt: str | None = None
    """Prompt of the class images"""
    repeats: int | None = Field(None, ge=1, le=100_000)
    """Times that each image is shown in an epoch"""
    weight: float | None = Field(None, ge=0, le=1000)
    """Factor on the loss of the images"""
    prior: Prior | None = None
    """Prior preservation of the concept"""


class UnderSettings(Strict):
    """An adapter under the training: merged into the base while another one is trained on top of it."""

    adapter: str = ""
    """Adapter file of any tool, or folder of a run, that is merged into the base while training"""
    strength: float = Field(1.0, ge=-100, le=100)
    """Strength of the adapter under the training"""
    when: Literal["training", "always"] = "training"
    """Whether samples and before/after pictures are drawn without it (training), as with the training adapter of a
    distilled base, or with it (always), as with an adapter that the new one will be used with"""


class Validation(Strict):
    """Held-out images, and what their loss decides."""

    images: str = ""
    """Folder of held-out images"""
    share: float = Field(0.0, ge=0, lt=1)
    """Share of the images held out instead of such a folder, the same in every run"""
    every: int = Field(50, ge=1)
    """Steps between validations"""
    pairs: int = Field(64, ge=1, le=10_000)
    """Fixed pairs of timestep and noise that the held-out loss is a mean over"""
    patience: int = Field(0, ge=0)
    """Validations without a new best loss after which training ends; 0: never"""

    @property
    def is_on(self) -> bool:
        return bool(self.images) or self.share > 0


class Loss(LossOfErrors):
    """Objective, loss function and loss weights."""

    objective: str = ""
    """Objective: captioned, dreambooth, prior-prediction, consistency, preference, slider, picture-slider, align, or
    that of an outside package; unset: the one that fits the task and its prior preservation"""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the objective"""
