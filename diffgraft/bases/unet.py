"""What the families with a UNet of diffusers share: layers, blocks, schedule, inpainting, ways to compute attention."""

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
"""Layers in a block of all UNets of Stable Diffusion; files say it of others, as some names are counted by it"""


class UNetFamily(Family):
    """A family whose denoiser is a ``UNet2DConditionModel``."""

    denoiser = "unet"
    layers: Mapping[str, Mapping[str, tuple[str, ...]]] = {
        "unet": {
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
        """Whether a pipeline is of the family's class, or of that for inpainting."""
        return type(pipe).__name__ in (self.pipeline_class, inpainting(self.pipeline_class))

    def parameterization(self, scheduler: Any) -> Parameterization:
        """ε or v, on the schedule of DDPM."""
        return ddpm_parameterization(scheduler)

    def denoise(self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, told: Conditioning) -> Tensor:
        prediction: Tensor = denoiser(base.denoiser_input(noisy), timesteps, **unet_arguments(told)).sample
        return prediction

    def header(self, base: Base) -> dict[str, Any]:
        """The layers in a block, where there are not two, as usual."""
        layers = base.unet.config.layers_per_block
        return {"layers_per_block": layers} if isinstance(layers, int) and layers != _USUAL_LAYERS else {}

    def timing_block(self, base: Base) -> tuple[nn.Module, dict[str, tuple[int, ...]], int]:
        """The first block of the way down."""
        unet = base.unet
        block, width = unet.down_blocks[0], int(unet.config.block_out_channels[0])
        shapes: dict[str, tuple[int, ...]] = {"temb": (1, 4 * width)}
        if getattr(block, "has_cross_attention", False):
            shapes["encoder_hidden_states"] = (1, 77, int(unet.config.cross_attention_dim))
        return block, shapes, width

    def set_attention(self, denoiser: Any, kind: str) -> None:
        """Give the attentions of a UNet one of diffusers' processors.

        They are of the older kind, which its attention backends (`set_attention_backend`) do not reach.
        """
        from diffusers.models.attention_processor import AttnProcessor

        if kind == "plain":
            denoiser.set_attn_processor(AttnProcessor())
        elif kind == "sliced":
            denoiser.set_attention_slice("max")  # "auto" halves the heads, and of one head makes none
        elif kind == "xformers":
            denoiser.enable_xformers_memory_efficient_attention()

    def pipeline(self, base: Base) -> Any:
        """Diffusers' pipeline of the family, or its inpainting one, without what checks or describes pictures."""
        import diffusers

        shared: dict[str, Any] = dict(base.parts()) | base.tokenizers()
        if self.pipeline_class == "StableDiffusionPipeline":  # of inpainting, too
            shared |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        scheduler = type(base.scheduler).from_config(base.scheduler.config)
        kind = inpainting(self.pipeline_class) if base.is_inpainting else self.pipeline_class
        pipe = getattr(diffusers, kind)(scheduler=scheduler, **shared)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def unet_arguments(told: Conditioning) -> dict[str, Any]:
    """The keyword arguments of a UNet's call for what it is told."""
    more = {"added_cond_kwargs": told.added} if told.added else {}
    return {"encoder_hidden_states": told.hidden_states, **more}


def inpainting(pipeline_class: str) -> str:
    """Name of diffusers' pipeline for inpainting UNets of a family, from that of its own."""
    return pipeline_class.replace("Pipeline", "InpaintPipeline")
