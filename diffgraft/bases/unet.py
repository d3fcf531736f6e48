"""Base class of the families whose denoiser is a diffusers UNet: layers, blocks, noise schedule, inpainting."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.family import Conditioning, Family
from diffgraft.bases.prediction import ddpm_parameterization
from diffgraft.diffusion.parameterizations import Parameterization

_TEXT = {
    "attention": (
        *("q_proj", "k_proj", "v_proj", "out_proj"),  # of CLIP
        *("self.query", "self.key", "self.value", "attention.output.dense"),  # of BERT
    ),
    "feedforward": ("fc1", "fc2", "intermediate.dense", "output.dense"),
}
_USUAL_LAYERS = 2
"""Layers per block in all UNets of Stable Diffusion; headers give other numbers, as some names depend on them"""


class UNetFamily(Family):
    """A family whose denoiser is a ``UNet2DConditionModel``."""

    denoiser = "unet"
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

    def has_pipeline(self, pipe: Any) -> bool:
        """Whether a pipeline has the family's class, or its inpainting class."""
        return type(pipe).__name__ in (self.pipeline_class, inpainting(self.pipeline_class))

    def parameterization(self, scheduler: Any) -> Parameterization:
        """Return ε- or v-prediction on the noise schedule of DDPM."""
        return ddpm_parameterization(scheduler)

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        given = base.denoiser_input(noisy, conditioning.channels)
        prediction: Tensor = denoiser(given, timesteps, **unet_arguments(conditioning)).sample
        return prediction

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

    def set_attention(self, denoiser: Any, kind: str) -> None:
        """Set one of diffusers' attention processors: ``plain``, ``sliced`` or ``xformers``.

        A UNet's attentions are of the older kind, which diffusers' `set_attention_backend` does not affect.
        """
        from diffusers.models.attention_processor import AttnProcessor

        if kind == "plain":
            denoiser.set_attn_processor(AttnProcessor())
        elif kind == "sliced":
            denoiser.set_attention_slice("max")  # "auto" halves the number of heads, which fails for one head
        elif kind == "xformers":
            denoiser.enable_xformers_memory_efficient_attention()

    def pipeline(self, base: Base) -> Any:
        """Return the family's pipeline, or its inpainting pipeline, without safety checker and feature extractor."""
        import diffusers

        shared: dict[str, Any] = dict(base.parts()) | base.tokenizers()
        if self.pipeline_class == "StableDiffusionPipeline":  # for inpainting, too
            shared |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        scheduler = type(base.scheduler).from_config(base.scheduler.config)
        kind = inpainting(self.pipeline_class) if base.is_inpainting else self.pipeline_class
        pipe = getattr(diffusers, kind)(scheduler=scheduler, **shared)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def unet_arguments(conditioning: Conditioning) -> dict[str, Any]:
    """Return the keyword arguments of a UNet's forward for a conditioning."""
    more = {"added_cond_kwargs": conditioning.added} if conditioning.added else {}
    return {"encoder_hidden_states": conditioning.hidden_states, **more}


def inpainting(pipeline_class: str) -> str:
    """Return the class name of diffusers' inpainting pipeline for the class name of a text-to-image pipeline."""
    return pipeline_class.replace("Pipeline", "InpaintPipeline")
