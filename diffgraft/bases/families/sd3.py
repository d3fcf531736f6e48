"""Stable Diffusion 3 and 3.5: a transformer over text and picture, told by two CLIPs and T5."""

from collections.abc import Sequence

from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, Conditioning, TextSlot
from diffgraft.bases.flow import CLIP_LAYERS, JOINT_ATTENTION, KL_VAE, SCHEDULER, T5_LAYERS, FlowFamily, levels

_CLIP = Component("transformers", ("CLIPTextModelWithProjection",))
_TOKENIZER = Component("transformers", ("CLIPTokenizer", "CLIPTokenizerFast"))


class StableDiffusion3(FlowFamily):
    """The family of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206)."""

    name = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    guidance = 7.0
    text = (
        TextSlot("text_encoder", "tokenizer"),
        TextSlot("text_encoder_2", "tokenizer_2"),
        TextSlot("text_encoder_3", "tokenizer_3"),
    )
    components = {  # noqa: RUF012
        "transformer": Component("diffusers", ("SD3Transformer2DModel",)),
        "vae": KL_VAE,
        "scheduler": SCHEDULER,
        "text_encoder": _CLIP,
        "tokenizer": _TOKENIZER,
        "text_encoder_2": _CLIP,
        "tokenizer_2": _TOKENIZER,
        "text_encoder_3": Component("transformers", ("T5EncoderModel",), required=False),
        "tokenizer_3": Component("transformers", ("T5Tokenizer", "T5TokenizerFast"), required=False),
    }
    layers = {  # noqa: RUF012
        "transformer": {
            "attention": (*JOINT_ATTENTION, "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
            "feedforward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
            "modulation": ("norm1.linear", "norm1_context.linear"),
        },
        "text_encoder": CLIP_LAYERS,
        "text_encoder_2": CLIP_LAYERS,
        "text_encoder_3": T5_LAYERS,
    }
    checkpointed = ("JointTransformerBlock",)

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:  # noqa: ARG002
        """Return the states of both CLIPs beside those of T5, [n, 77 + 256, 4096], and pooled embeddings.

        Prompts are truncated to the encoders' lengths. Without T5, its states are zeros.
        """
        texts = list(prompts)
        states, _, pooled, _ = base.pipeline().encode_prompt(texts, texts, texts, do_classifier_free_guidance=False)
        return Conditioning(states, {"pooled_projections": pooled})

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        dtype = base.denoiser.dtype
        prediction: Tensor = denoiser(
            hidden_states=noisy.to(dtype),
            timestep=1000 * self.sigmas(base, timesteps, noisy),
            encoder_hidden_states=conditioning.hidden_states.to(dtype),
            pooled_projections=conditioning.added["pooled_projections"].to(dtype),
            return_dict=False,
        )[0]
        return prediction

    def sampling_sigmas(self, base: Base, tokens: int, steps: int) -> list[float] | None:  # noqa: ARG002
        """Return the noise levels of diffusers' scheduler, which are even in σ before its shift."""
        scheduler = type(base.scheduler).from_config(base.scheduler.config)
        scheduler.set_timesteps(steps)
        return levels(scheduler.sigmas)

    def affects_output(self, base: Base, part: str, path: str) -> bool:
        """Whether the module affects the picture: the queries of the text in the last block do not."""
        last = f"transformer_blocks.{base.denoiser.config.num_layers - 1}.attn."
        return part != self.denoiser or path not in (f"{last}add_q_proj", f"{last}norm_added_q")


FAMILY = StableDiffusion3()
