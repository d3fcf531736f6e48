"""The keys of a recipe in groups: users write them flat, functions take the group that they need."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, field_validator

from diffgraft.data.settings import Buckets, Captions, Conditions, FolderLayout, Masks, Tags
from diffgraft.diffusion.settings import Noise, Timesteps
from diffgraft.strict import Strict
from diffgraft.trainers.recipe.settings import Loss, Prior, UnderSettings, Validation

if TYPE_CHECKING:  # listing recipes does without torch
    from diffgraft.bases.loading import LoadOptions


class Group(Strict):
    """A group of recipe keys; immutable."""

    model_config = ConfigDict(frozen=True)


class ModelSettings(Group):
    """The base: which one, and how its files are read."""

    base: str = "tiny"
    """`tiny`, a diffusers folder, a single .safetensors checkpoint (of a transformer also .gguf), or a hub id"""
    components: str = ""
    """Diffusers folder or hub id with the text encoders, VAE and noise schedule, if `base` is the single file of a
    transformer"""
    prediction_type: Literal["epsilon", "v_prediction", None] = None
    """What the denoiser predicts; unset: what the files of the base say"""
    zero_snr: bool | None = None
    """Whether the noise schedule is rescaled to end in pure noise (zero terminal SNR); unset: what the files of the
    base say"""
    quantize: Literal["none", "fp8", "int8", "nf4"] = "none"
    """Hold the frozen linear layers of the base in float8 (fp8), which keeps files in float8 as they are, or by
    bitsandbytes in 8 bits (int8) or 4 bits (nf4): less memory, slightly less exact"""

    @property
    def sets_prediction(self) -> bool:
        """Whether the recipe sets the prediction type, instead of the files of the base."""
        return self.prediction_type is not None

    def layout_options(self) -> dict[str, Any]:
        """Return the options of `meta_base`, without the dtype."""
        schedule = {"prediction_type": self.prediction_type, "zero_snr": self.zero_snr}
        return {**schedule, "components": self.components or None}

    def load_options(self) -> "LoadOptions":
        """Return the options of `load_base`, without the dtype."""
        options: LoadOptions = {"prediction_type": self.prediction_type, "zero_snr": self.zero_snr}
        return {**options, "components": self.components or None, "quantize": self.quantize}


class AdapterSettings(Group):
    """The adapter: its method, where it is attached, and what it starts from."""

    method: str = "lora"
    """Method of the adapter; `diffgraft methods` lists them"""
    rank: int = Field(8, ge=1, le=8192)
    """Inner dimension of the low-rank factors"""
    alpha: float | None = Field(None, gt=0, le=1_000_000)
    """Numerator of the scale alpha / rank of the adapter; unset: alpha = rank, a scale of 1"""
    layers: Literal["context", "attention", "attention+feedforward", "all", None] = None
    """Layers that are adapted: the keys and values of cross-attention, all projections of attention, those and the
    feed-forward layers, or also the convolutions; unset: the default of the method"""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the method itself, such as options.dora=true; `diffgraft methods NAME` lists them"""
    text_encoder: bool = False
    """Whether the attention of the text encoder is adapted too"""
    init_from: str = ""
    """Adapter file of any tool, or folder of a run, that training starts from; its ranks, scales and values are used
    for the modules that it has"""
    under: UnderSettings = Field(default_factory=lambda: UnderSettings.model_validate({}))
    """Adapter under the training"""

    def alpha_or_rank(self) -> float:
        """Return alpha, or the rank where alpha is unset."""
        return float(self.rank if self.alpha is None else self.alpha)


class DataSettings(Group):
    """Images and prompts, of the whole recipe or of one concept."""

    images: str = ""
    """Images to learn from: a folder (numbered folders such as `10_sks dog/` work as in kohya's tools), a data set of
    `datasets` on disk, or its id on the hub"""
    layout: FolderLayout = "auto"
    """How a folder is read: as the images in it (flat), as numbered folders (kohya), or by what it contains (auto)"""
    outside: bool = False
    """Whether caption tables and symbolic links may name images outside the folder"""
    repeats: int = Field(1, ge=1, le=100_000)
    """Times that each image is shown in an epoch"""
    weight: float = Field(1.0, ge=0, le=1000)
    """Factor on the loss of these images; useful for concepts"""
    picture_weights: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Further factors on the loss of single images, by the name of their file: {"IMG_3.jpg": 0.2}; 0 leaves an image
    out of the loss"""
    resolution: int | None = Field(None, ge=8, le=8192)
    """Side in pixels that images are cropped and scaled to; unset: the resolution of the base"""
    buckets: Buckets = Field(default_factory=lambda: Buckets.model_validate({}))
    """Aspect-ratio buckets: sizes other than squares"""
    crop: Literal["center", "random"] = "center"
    """Which part of an image is shown: the largest at its center, or random crops"""
    crops: int = Field(4, ge=1, le=256)
    """Number of random crops of each image, shown in turn"""
    crop_scale: float = Field(1.0, ge=0.1, le=1)
    """Side of the smallest random crop, as a share of that of the largest; below 1, random crops
    differ in size, those of square images too"""
    flip: bool = False
    """Whether images are also shown mirrored, every other time"""
    masks: Masks = Field(default_factory=lambda: Masks.model_validate({}))
    """Masks that weight the loss by region"""
    trigger: str = "sks"
    """Word that calls what was learned; a rare word with little meaning of its own"""
    prompt: str = "{trigger}"
    """Prompt of images without a caption; {trigger} and, in subject recipes, {subject} are filled in"""
    captions: Captions = Field(default_factory=lambda: Captions.model_validate({}))
    """Captions beside the images"""
    caption_column: str = ""
    """Column of a table or data set with the captions; unset: text, caption, captions or prompt"""
    insert_trigger: bool = False
    """Whether the trigger is put before captions, and before names of kohya folders, that lack it"""
    caption_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the times that an image is shown with an empty prompt"""
    tags: Tags = Field(default_factory=lambda: Tags.model_validate({}))
    """Captions as lists of tags"""
    long_prompts: Literal["cut", "refuse", "chunk"] = "cut"
    """Prompts longer than the context of the text encoder are cut, refused, or encoded in chunks as the webui does"""
    templates: Literal["none", "object", "style"] = "none"
    """Show each image without a caption under many prompts in turn: templates for objects, or for styles"""
    cache: bool = True
    """Whether latents and text embeddings are cached on disk for other runs"""

    @property
    def noun(self) -> str:
        """Class noun of the subject; empty for tasks without one."""
        return str(getattr(self, "subject", ""))

    @property
    def prior_preservation(self) -> Prior | None:
        """Settings of prior preservation; None where it is off."""
        prior: Prior | None = getattr(self, "prior", None)
        return None if prior is None or prior.weight == 0 else prior

    @property
    def conditions(self) -> Conditions | None:
        """Settings of condition pictures; None for tasks without them."""
        conditions: Conditions | None = getattr(self, "control", None)
        return conditions

    def fill(self, template: str) -> str:
        """Return `template` with {trigger} and {subject} filled in."""
        return template.replace("{trigger}", self.trigger).replace("{subject}", self.noun)

    def class_prompts(self, captions: Sequence[str | None]) -> list[str]:
        """Return the prompts of class images for images with these captions; empty for tasks without class prompts."""
        texts = dict.fromkeys(self.class_text(caption) for caption in captions)
        return list(dict.fromkeys(prompt for text in texts if text for prompt in self.class_variants(text)))

    def class_variants(self, text: str) -> list[str]:
        """Return the prompts that `prior.prompts` makes of a class prompt; without them, the class prompt alone."""
        prior: Prior | None = getattr(self, "prior", None)
        templates = prior.prompts if prior is not None else []
        return [self.fill(template).replace("{class_prompt}", text) for template in templates] or [text]

    def class_text(self, caption: str | None) -> str:  # noqa: ARG002  (others need it)
        """Return the class prompt of an image with that caption; empty for tasks without class prompts."""
        return ""


class OptimSettings(Group):
    """Optimization: steps, batch size, learning rates and the optimizer."""

    steps: int = Field(300, ge=1, le=10_000_000)
    """Number of optimizer steps"""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random: initial weights, noise, timesteps, order, class images, samples"""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate"""
    lr_scale: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Factors on the learning rate, by part (unet, text_encoder, text_encoder_2), block (IN00 … M00 … OUT11, BASE) or
    pattern of a module's path: {"text_encoder": 0.5, "OUT*": 2}. Where several match a module, the last one counts
    alone. A module with factor 0 does not train and is left out of the adapter"""
    text_encoder_stop: int | None = Field(None, ge=1)
    """Step after which text encoders and new words are frozen; unset: they train to the end"""
    lr_schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts"] = "constant"
    """Learning-rate schedule after the warmup"""
    lr_cycles: int = Field(1, ge=1, le=10_000)
    """Number of cycles of cosine_with_restarts"""
    warmup: int = Field(0, ge=0, le=10_000_000)
    """Steps of linear learning-rate warmup"""
    batch: int = Field(4, ge=1, le=4096)
    """Batch size on each process; class images come on top"""
    accumulate: int = Field(1, ge=1, le=10_000)
    """Gradient accumulation: micro-batches of one optimizer step"""
    optimizer: Literal["adamw", "adamw8bit", "lion", "lion8bit", "adafactor", "prodigy", "schedule-free"] = "adamw"
    """AdamW of PyTorch, AdamW or Lion in 8 bits of bitsandbytes, Adafactor of transformers, Prodigy, which finds the
    learning rate itself (lr=1), or the AdamW of schedulefree"""
    weight_decay: float = Field(0.01, ge=0, le=1000)
    """Decoupled weight decay"""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of the exponential moving average (EMA) of the trained parameters, which is then saved and used for
    samples; 0: no EMA. 0.999 suits thousands of steps, less suits fewer"""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm that the gradient is clipped to"""


class ObjectiveSettings(Group):
    """Noise, timesteps and loss."""

    noise: Noise = Field(default_factory=lambda: Noise.model_validate({}))
    """Noise beyond plain Gaussian noise"""
    timesteps: Timesteps = Field(default_factory=lambda: Timesteps.model_validate({}))
    """Timesteps that are trained on"""
    loss: Loss = Field(default_factory=lambda: Loss.model_validate({}))
    """Loss function and loss weights"""


class RuntimeSettings(Group):
    """Precision, memory and speed."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the frozen base and of autocast; the adapter itself is trained in float32"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time"""
    block_swap: int = Field(0, ge=0, le=1000)
    """Number of blocks of a frozen transformer, the last ones, that wait in main memory and are on the GPU only while
    they compute: less memory for more time; needs gradient_checkpointing"""
    attention: Literal["default", "plain", "xformers", "sliced"] = "default"
    """Attention of the denoiser: the fused kernel of PyTorch (default), plain matrix products, the package xformers, or
    one head at a time (sliced)"""
    channels_last: bool = False
    """Store the convolution weights of the denoiser in channels-last memory format, which GPUs prefer in half
    precision"""
    compile: bool = False
    """Compile the denoiser with torch.compile: the first steps take minutes, later steps are faster"""
    shard: Literal["none", "fsdp", "zero3"] = "none"
    """Shard the frozen denoiser over the processes of the run, by FSDP of PyTorch or ZeRO stage 3 of DeepSpeed"""


class OutputSettings(Group):
    """Files and images that a run writes, and when."""

    output: str = ""
    """Folder of the run; unset: runs/<recipe>-<time>"""
    format: str = "auto"
    """Format of the adapter file; auto: of the formats that can hold the adapter, the one that most programs open"""
    checkpoint_every: int = Field(100, ge=0, le=10_000_000)
    """Steps between checkpoints; 0: only when interrupted"""
    sample_every: int = Field(100, ge=0, le=10_000_000)
    """Steps between sample images; 0: none"""
    previews: bool = True
    """Whether any images are generated: samples during training, and before-after.png at the end"""
    adapter_every: int = Field(0, ge=0, le=10_000_000)
    """Steps between adapters saved during training, in `adapters/` of the folder of the run; 0: none"""
    watch_every: int = Field(0, ge=0, le=10_000_000)
    """Steps between measurements of the loss of every image at fixed noise, which name at the end the images that
    stand out; 0: none"""
    trackers: list[str] = Field(default_factory=list)
    """Trackers of accelerate that log losses and samples: tensorboard (into `logs/` of the folder of the run), wandb
    and others"""
    sample_prompts: list[str] = Field(default_factory=list)
    """Prompts of the samples and of before-after.png; {trigger} and {subject} are filled in; unset: those of the
    task"""
    validation: Validation = Field(default_factory=lambda: Validation.model_validate({}))
    """Held-out images, and what their loss decides"""

    @field_validator("trackers", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        """Split text from the command line at commas and vertical bars."""
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return value
        return [part.strip() for word in words for part in re.split(r"[,|]", word) if part.strip()]
