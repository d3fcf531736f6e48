"""The settings of a recipe in groups: written flat by users, and taken group by group by the code."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, field_validator

from diffgraft.data.settings import Buckets, Captions, FolderLayout, Masks, Tags
from diffgraft.diffusion.settings import Noise, Timesteps
from diffgraft.strict import Strict
from diffgraft.trainers.recipe.settings import Loss, Prior, Validation

if TYPE_CHECKING:  # listing recipes does without torch
    from diffgraft.bases.loading import LoadOptions


class Group(Strict):
    """A group of settings, which never change."""

    model_config = ConfigDict(frozen=True)


class ModelSettings(Group):
    """The base: which one, and how its files are read."""

    base: str = "tiny"
    """`tiny`, a diffusers folder, a single .safetensors checkpoint, or a hub id"""
    prediction_type: Literal["epsilon", "v_prediction", None] = None
    """What the base's UNet predicts; unset: what its files say"""
    zero_snr: bool | None = None
    """Whether its noise schedule is rescaled to end in pure noise; unset: what its files say"""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Hold the weights of its linear layers in 8 bits (int8) or about 4 (nf4): less memory, a little less exact"""

    @property
    def says_prediction(self) -> bool:
        """Whether the recipe, and not the base's files, says what the denoiser predicts."""
        return self.prediction_type is not None

    def schedule_options(self) -> dict[str, Any]:
        """What the recipe says of prediction and noise schedule."""
        return {"prediction_type": self.prediction_type, "zero_snr": self.zero_snr}

    def load_options(self) -> "LoadOptions":
        """How the base is loaded, beside its precision."""
        return {"prediction_type": self.prediction_type, "zero_snr": self.zero_snr, "quantize": self.quantize}


class AdapterSettings(Group):
    """The adapter: its method, where it is attached, and what it starts from."""

    method: str = "lora"
    """How the adapter is parametrised; `diffgraft methods` lists them"""
    rank: int = Field(8, ge=1, le=8192)
    """Inner dimension of the low-rank factors"""
    alpha: float | None = Field(None, gt=0, le=1_000_000)
    """The adapter's scale is alpha / rank; unset: alpha = rank, a scale of 1"""
    layers: Literal["attention", "attention+feedforward", "all", None] = None
    """Layers that are adapted: the projections of the attention, with the feed-forward layers too, or also the
    convolutions; unset: what the method is made for"""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings that only the method has: options.dora=true; `diffgraft methods NAME` lists them"""
    text_encoder: bool = False
    """Whether the text encoder's attention is adapted too"""
    init_from: str = ""
    """An adapter file of any tool that training starts from, or a run's folder; ranks, scales and values are those of
    the file, in the modules that it has"""

    def scale_alpha(self) -> float:
        """Alpha, with the default filled in."""
        return float(self.rank if self.alpha is None else self.alpha)


class DataSettings(Group):
    """Pictures and prompts, of the whole recipe or of one concept."""

    images: str = ""
    """The pictures to learn from: a folder, in kohya's layout (`10_sks dog/`) as well, or a data set of `datasets`, in
    a folder or by its id on the hub"""
    layout: FolderLayout = "auto"
    """How the folder is read: by what it holds, as the pictures in it (flat), or as numbered folders (kohya)"""
    outside: bool = False
    """Whether tables of captions and links may bring pictures from outside the folder"""
    repeats: int = Field(1, ge=1, le=100_000)
    """How often each picture comes in a round"""
    weight: float = Field(1.0, ge=0, le=1000)
    """Factor on the loss of the pictures; for concepts that have their own"""
    resolution: int | None = Field(None, ge=8, le=8192)
    """Side in pixels that pictures are cut and scaled to; unset: the base's own"""
    buckets: Buckets = Field(default_factory=lambda: Buckets.model_validate({}))
    """Sizes other than squares"""
    crop: Literal["center", "random"] = "center"
    """Which part of a picture is shown, where its shape is another: the middle, or places drawn at random"""
    crops: int = Field(4, ge=1, le=256)
    """How many such places of each picture take turns"""
    flip: bool = False
    """Whether pictures are also shown mirrored, every other time they come round"""
    masks: Masks = Field(default_factory=lambda: Masks.model_validate({}))
    """Where pictures count"""
    trigger: str = "sks"
    """The word that calls what was learnt; a rare one, with little meaning of its own"""
    prompt: str = "{trigger}"
    """Prompt of a picture without a caption, with {trigger} and, in subject recipes, {subject}"""
    captions: Captions = Field(default_factory=lambda: Captions.model_validate({}))
    """What stands beside pictures"""
    caption_column: str = ""
    """Column of a table or data set that holds the captions; unset: text, caption, captions or prompt"""
    insert_trigger: bool = False
    """Whether the trigger is put before captions, and names of kohya's folders, that lack it"""
    caption_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the times that a picture is shown without any prompt"""
    tags: Tags = Field(default_factory=lambda: Tags.model_validate({}))
    """Captions as lists of tags"""
    long_prompts: Literal["cut", "refuse", "chunk"] = "cut"
    """What to do with prompts that are longer than the text encoder reads: cut them, refuse them, or read them in
    pieces of that length, as the webui does"""
    templates: Literal["none", "object", "style"] = "none"
    """Show each picture without a caption under many prompts in turn: those for objects, or those for styles"""
    cache: bool = True
    """Whether latents and text states are kept in the cache for other runs"""

    @property
    def noun(self) -> str:
        """The class noun of what the pictures show; empty where the task has none."""
        return str(getattr(self, "subject", ""))

    @property
    def prior_preservation(self) -> Prior | None:
        """Its prior preservation, where there is any."""
        prior: Prior | None = getattr(self, "prior", None)
        return None if prior is None or prior.weight == 0 else prior

    def fill(self, template: str) -> str:
        """A template with the trigger and the class noun."""
        return template.replace("{trigger}", self.trigger).replace("{subject}", self.noun)

    def class_prompts(self, captions: Sequence[str | None]) -> list[str]:  # noqa: ARG002  (others need them)
        """What class images show, given the pictures' captions; none where the task has no prior preservation."""
        return []

    def class_text(self, caption: str | None) -> str:  # noqa: ARG002  (others need it)
        """What a picture with that caption shows, but for what is learnt; empty where the task does not know."""
        return ""


class OptimSettings(Group):
    """Optimisation: steps, batches, learning rates and the optimizer."""

    steps: int = Field(300, ge=1, le=10_000_000)
    """Optimiser steps"""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random: initial weights, noise, timesteps, order, class images, samples"""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate"""
    lr_scale: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Factors on the learning rate, by part (unet, text_encoder, text_encoder_2), block (IN00 … M00 … OUT11, BASE) or
    pattern of a module's path: {"text_encoder": 0.5, "OUT*": 2}. Where several match a module, the last one counts
    alone. A module with factor 0 does not train and is left out of the adapter"""
    text_encoder_stop: int | None = Field(None, ge=1)
    """Step from which on text encoders, and new words, train no more; unset: they train to the end"""
    lr_schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts"] = "constant"
    """How the rate goes after the warm-up"""
    lr_cycles: int = Field(1, ge=1, le=10_000)
    """How often it falls to zero, with cosine_with_restarts"""
    warmup: int = Field(0, ge=0, le=10_000_000)
    """Steps over which the rate rises from zero"""
    batch: int = Field(4, ge=1, le=4096)
    """Instance pictures in a step, on each process; class images come on top"""
    accumulate: int = Field(1, ge=1, le=10_000)
    """Batches whose gradients are added up for one optimiser step"""
    optimizer: Literal["adamw", "adamw8bit", "lion", "lion8bit", "adafactor", "prodigy", "schedule-free"] = "adamw"
    """AdamW of torch, or in 8 bits of bitsandbytes, whose Lion is, too; Adafactor of transformers; Prodigy, which finds
    the rate itself (lr=1); schedulefree's AdamW"""
    weight_decay: float = Field(0.01, ge=0, le=1000)
    """Decoupled weight decay"""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of a moving average of what trains, which is then what is saved and drawn with; 0: none. 0.999 for
    thousands of steps, less for few"""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm the gradient is clipped to"""


class ObjectiveSettings(Group):
    """What the loss is made of."""

    noise: Noise = Field(default_factory=lambda: Noise.model_validate({}))
    """What is laid on latents beside plain noise"""
    timesteps: Timesteps = Field(default_factory=lambda: Timesteps.model_validate({}))
    """At which timesteps training takes place"""
    loss: Loss = Field(default_factory=lambda: Loss.model_validate({}))
    """How errors are counted"""


class RuntimeSettings(Group):
    """How a run computes: precision, memory and speed."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen base and of the arithmetic; the adapter itself is trained in float32"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time"""
    attention: Literal["default", "plain", "xformers", "sliced"] = "default"
    """How the UNet's attentions are computed: by PyTorch's fused attention, step by step, by the package xformers, or
    one head after the other"""
    channels_last: bool = False
    """Lay the weights of the UNet's convolutions out with the channels last, as GPUs have it in half precision"""
    compile: bool = False
    """Compile the UNet (torch.compile): the first steps take minutes, the others less time"""
    shard: Literal["none", "fsdp", "zero3"] = "none"
    """Deal the frozen UNet out to the processes that train together, by PyTorch's FSDP or DeepSpeed's ZeRO, stage 3"""


class OutputSettings(Group):
    """What a run writes and draws, and when."""

    output: str = ""
    """Folder of the run; unset: runs/<recipe>-<time>"""
    format: str = "auto"
    """Format of the adapter files; auto: the one that most programs open, of those that hold what the method makes"""
    checkpoint_every: int = Field(100, ge=0, le=10_000_000)
    """Steps between checkpoints; 0: only when interrupted"""
    sample_every: int = Field(100, ge=0, le=10_000_000)
    """Steps between sample pictures; 0: none"""
    previews: bool = True
    """Whether pictures are drawn at all: samples on the way, and before-after.png in the end"""
    adapter_every: int = Field(0, ge=0, le=10_000_000)
    """Steps between adapters that are kept on the way, in `adapters/` of the run's folder; 0: none"""
    trackers: list[str] = Field(default_factory=list)
    """Trackers of accelerate that are shown losses and samples: tensorboard (into `logs/` of the run's folder), wandb
    and others"""
    sample_prompts: list[str] = Field(default_factory=list)
    """Prompts of the samples and of before-after.png, with {trigger} and {subject}; unset: the task's own"""
    validation: Validation = Field(default_factory=lambda: Validation.model_validate({}))
    """Pictures held out, and what their loss decides"""

    @field_validator("trackers", mode="before")
    @classmethod
    def _taken_apart(cls, said: Any) -> Any:
        """As a command line gives them, by commas or strokes."""
        words = [said] if isinstance(said, str) else said
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return said
        return [part.strip() for word in words for part in re.split(r"[,|]", word) if part.strip()]
