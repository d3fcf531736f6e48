"""Base class of the families whose denoiser is a diffusers UNet: layers, blocks, noise schedule, inpainting."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.control import InputControl, PictureLayer
from diffgraft.bases.family import Component, Conditioning, ControlSignal, Family
from diffgraft.bases.prediction import ddpm_parameterization
from diffgraft.bases.student import StudentSize, student_unet
from diffgraft.diffusion.parameterizations import Parameterization
from diffgraft.errors import DiffgraftError, one_line, short_repr

_TEXT = {
    "attention": (
        *("q_proj", "k_proj", "v_proj", "out_proj"),  # of CLIP
        *("self.query", "self.key", "self.value", "attention.output.dense"),  # of BERT
    ),
    "feedforward": ("fc1", "fc2", "intermediate.dense", "output.dense"),
}
_TOKENIZER = Component("transformers", ("CLIPTokenizer", "CLIPTokenizerFast", "BertTokenizer", "BertTokenizerFast"))
_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
_COMPONENTS: Mapping[str, Component] = {
    "unet": Component("diffusers", ("UNet2DConditionModel",)),
    "vae": Component("diffusers", ("AutoencoderKL",)),
    "scheduler": Component("diffusers", _SCHEDULERS),
    "text_encoder": Component("transformers", ("CLIPTextModel", "CLIPTextModelWithProjection", "BertModel")),
    "tokenizer": _TOKENIZER,
}
_USUAL_LAYERS = 2
"""Layers per block in all UNets of Stable Diffusion; headers give other numbers, as some names depend on them"""
_CONTROL_WIDTHS = (16, 32, 96, 256)
"""Widths of the convolutions that read a condition picture, each after the first with half of its sides (Zhang et al.
2023, arXiv:2302.05543, section 3.3): three halvings for latents of an eighth, fewer for other VAEs"""
_PICTURE_LAYER = re.compile(
    r"(?P<side>down|mid|up)_blocks?(?:\.(?P<number>\d+))?\.attentions\.\d+\."
    r"(?:proj_in|proj_out|transformer_blocks\.\d+\.(?:attn1\..+|attn2\.to_(?:q|out\.0)|ff\.net\..+))"
)
"""Path of a layer with one input for each square of the picture, and the level of its block"""
_USUAL_PICTURE_LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q")
_SHARED_WIDTHS = ("block_out_channels", "layers_per_block", "cross_attention_dim")
"""Settings that a control network must have in common with the UNet"""


class UNetFamily(Family):
    """A family whose denoiser is a ``UNet2DConditionModel``."""

    denoiser = "unet"
    components: Mapping[str, Component] = _COMPONENTS
    layers: Mapping[str, Mapping[str, tuple[str, ...]]] = {
        "unet": {
            "context": ("attn2.to_k", "attn2.to_v"),
            "attention": ("to_q", "to_k", "to_v", "to_out.0"),
            "feedforward": ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
            "convolution": (
                *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
            ),
        },
        "text_encoder": _TEXT,
        "text_encoder_2": _TEXT,
    }
    blocks = True
    checkpointed = ("ResnetBlock2D", "BasicTransformerBlock")
    unsupported: Mapping[str, str] = {
        "block_swap": "the blocks of its UNet differ in size and hand states to one another; quantize=nf4 saves memory"
    }

    def has_pipeline(self, pipe: Any) -> bool:
        """Whether a pipeline has the family's class, or its inpainting class."""
        return type(pipe).__name__ in (self.pipeline_class, inpainting_class(self.pipeline_class))

    def parameterization(self, scheduler: Any) -> Parameterization:
        """Return ε- or v-prediction on the noise schedule of DDPM."""
        return ddpm_parameterization(scheduler)

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        latents = base.denoiser_input(noisy, conditioning.channels)
        arguments, control = unet_arguments(conditioning), conditioning.control
        acting: AbstractContextManager[None] = nullcontext()
        if control is not None and isinstance(control.network, InputControl):
            acting = control.network.acting(control.pictures.to(latents.device), control.strength)
        elif control is not None:
            arguments |= _residuals(control, latents, timesteps, conditioning)
        with acting:
            prediction: Tensor = denoiser(latents, timesteps, **arguments).sample
        return prediction

    def picture_layers(self, base: Base) -> list[PictureLayer]:
        """Return the linear layers around and inside of attentions, but for keys and values of the text.

        The usual ones are queries, keys and values of the encoder and the middle, as in kohya-ss' ControlNet-LLLite.
        """
        layers, last = [], len(base.unet.down_blocks) - 1
        for path, module in base.unet.named_modules():
            found = _PICTURE_LAYER.fullmatch(path)
            if not found or not isinstance(module, nn.Linear):
                continue
            side, number = found["side"], int(found["number"] or 0)
            level = {"down": number, "mid": last, "up": last - number}[side]
            usual = side != "up" and path.endswith(_USUAL_PICTURE_LAYERS)
            layers.append(PictureLayer(path, base.vae_scale_factor * 2**level, usual))
        return layers

    def control_network(self, base: Base, settings: Mapping[str, Any] | None = None) -> nn.Module:
        """Build a ControlNet (Zhang et al. 2023, arXiv:2302.05543): a copy of the UNet's encoder with zero outputs."""
        from diffusers import ControlNetModel

        if settings is not None:
            if settings.get("_class_name", "ControlNetModel") != "ControlNetModel":
                raise ValueError(f"it is a {short_repr(settings['_class_name'])}, and not a ControlNetModel")
            for key in _SHARED_WIDTHS:
                own, needed = (_plain(config.get(key)) for config in (settings, base.unet.config))
                if own != needed:
                    raise ValueError(f"it is for a base with {key} {short_repr(own)}, and this one has {needed}")
            try:
                with torch.device("meta"):
                    network: nn.Module = ControlNetModel.from_config(dict(settings))
            except Exception as error:  # diffusers raises many kinds of exceptions for wrong settings
                reason = one_line(error, 200).rstrip(".")
                raise ValueError(f"its settings are not those of a ControlNet ({reason})") from error
            return network
        if base.quantize != "none":
            raise DiffgraftError(
                f"A control network begins as a copy of the base, which is quantized to {base.quantize}: set "
                "quantize=none."
            )
        with torch.device("meta" if base.device.type == "meta" else "cpu"):
            new: nn.Module = ControlNetModel.from_unet(
                base.unet, conditioning_embedding_out_channels=_control_widths(base)
            )
        return new

    def empty_control_network(self, base: Base, widths: Sequence[int] | None = None) -> nn.Module:
        from diffusers import ControlNetModel

        with torch.device("meta"):
            network: nn.Module = ControlNetModel.from_unet(
                base.unet,
                conditioning_embedding_out_channels=tuple(widths or _control_widths(base)),
                load_weights_from_unet=False,
            )
        return network

    def control_settings(self, network: nn.Module) -> dict[str, Any]:
        """Return the configuration of a ``ControlNetModel`` as its ``config.json`` has it."""
        config = {key: _plain(value) for key, value in dict(network.config).items()}  # type: ignore[arg-type]
        return {"_class_name": "ControlNetModel", **config}

    def student(self, base: Base, size: StudentSize) -> nn.Module:
        """Build a UNet with fewer or narrower layers, which begins with the base's weights."""
        if base.quantize != "none":
            raise DiffgraftError(
                f"A student begins with weights of the base, which is quantized to {base.quantize}: set quantize=none."
            )
        return student_unet(base.unet, size)

    def header(self, base: Base) -> dict[str, Any]:
        """Return ``layers_per_block``, unless it is the usual 2."""
        layers = base.unet.config.layers_per_block
        return {"layers_per_block": layers} if isinstance(layers, int) and layers != _USUAL_LAYERS else {}

    def block_for_timing(self, base: Base) -> tuple[nn.Module, dict[str, tuple[int, ...]], int]:
        """Return the first down block, the shapes of its arguments, and the channels of its input."""
        unet = base.unet
        block, width = unet.down_blocks[0], int(unet.config.block_out_channels[0])
        shapes: dict[str, tuple[int, ...]] = {"temb": (1, 4 * width)}
        if getattr(block, "has_cross_attention", False):
            shapes["encoder_hidden_states"] = (1, 77, int(unet.config.cross_attention_dim))
        return block, shapes, width

    def set_attention(self, denoiser: Any, kind: str) -> Callable[[], None]:
        """Set one of diffusers' attention processors: ``plain``, ``sliced`` or ``xformers``.

        A UNet's attentions are of the older kind, which diffusers' `set_attention_backend` does not affect.
        """
        from diffusers.models.attention_processor import AttnProcessor

        before = dict(denoiser.attn_processors)
        if kind == "plain":
            denoiser.set_attn_processor(AttnProcessor())
        elif kind == "sliced":
            denoiser.set_attention_slice("max")  # "auto" halves the number of heads, which fails for one head
        elif kind == "xformers":
            denoiser.enable_xformers_memory_efficient_attention()
        return lambda: denoiser.set_attn_processor(before)

    def pipeline(self, base: Base) -> Any:
        """Return the family's pipeline, or its inpainting pipeline, without safety checker and feature extractor."""
        import diffusers

        shared: dict[str, Any] = dict(base.parts()) | base.tokenizers()
        if self.pipeline_class == "StableDiffusionPipeline":  # for inpainting, too
            shared |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        scheduler = type(base.scheduler).from_config(base.scheduler.config)
        kind = inpainting_class(self.pipeline_class) if base.is_inpainting else self.pipeline_class
        pipe = getattr(diffusers, kind)(scheduler=scheduler, **shared)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def _control_widths(base: Base) -> tuple[int, ...]:
    """Return the widths of the convolutions that read a condition picture; their strides lead to the latents."""
    halvings = (base.vae_scale_factor - 1).bit_length()
    return _CONTROL_WIDTHS[: halvings + 1]


def unet_arguments(conditioning: Conditioning) -> dict[str, Any]:
    """Return the keyword arguments of a UNet's forward for a conditioning."""
    more = {"added_cond_kwargs": conditioning.added} if conditioning.added else {}
    return {"encoder_hidden_states": conditioning.hidden_states, **more}


def _residuals(
    control: ControlSignal, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
) -> dict[str, Any]:
    """Return what a ControlNet adds to the UNet's skip connections and middle, as keyword arguments of its forward.

    Args:
        control: the ControlNet with n condition pictures.
        latents: the UNet's input [n, c, h, w]; a ControlNet of fewer channels takes the first ones, the latents.
        timesteps: timesteps [n].
        conditioning: hidden states and further tensors of n prompts.
    """
    network: Any = control.network
    dtype = network.dtype
    arguments = unet_arguments(conditioning)
    arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"].to(dtype)
    down, middle = network(
        latents[:, : network.config.in_channels].to(dtype),
        timesteps,
        controlnet_cond=control.pictures.to(latents.device, dtype),
        conditioning_scale=control.strength,
        return_dict=False,
        **arguments,
    )
    added = [residual.to(latents.dtype) for residual in down]
    return {"down_block_additional_residuals": added, "mid_block_additional_residual": middle.to(latents.dtype)}


def _plain(value: Any) -> Any:
    """Return a setting as JSON has it: lists in the place of tuples."""
    return list(value) if isinstance(value, tuple) else value


def inpainting_class(pipeline_class: str) -> str:
    """Return the class name of diffusers' inpainting pipeline for the class name of a text-to-image pipeline."""
    return pipeline_class.replace("Pipeline", "InpaintPipeline")
