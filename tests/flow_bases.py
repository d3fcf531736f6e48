"""Small random bases of the flow-matching families, saved as diffusers folders."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from benchmarks.flow_sizes import qwen_tokenizer, t5_tokenizer
from diffgraft.bases.loading import TINY
from diffgraft.bases.modular import is_modular, pipeline_of
from diffgraft.bases.processors import text_processor

WIDTH = 32
"""Width of text states"""


def _clip(kind: type[nn.Module] = CLIPTextModelWithProjection, **settings: Any) -> nn.Module:
    common = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 49406, "eos_token_id": 49407}
    return kind(CLIPTextConfig(**{**common, **ends, "projection_dim": 16, "hidden_act": "gelu", **settings}))


def _t5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def _umt5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    return UMT5EncoderModel(UMT5Config(**sizes))


def _qwen3(kind: type[nn.Module]) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4}
    return kind(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=300, tie_word_embeddings=True))


def _qwen_vl() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    text = {**sizes, "num_key_value_heads": 2, "vocab_size": 300, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def _qwen3_vl(kind: type[nn.Module] = Qwen3VLModel) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 6, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
    text = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": WIDTH}
    more = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return kind(Qwen3VLConfig(text_config=text, vision_config={**vision, **more}))


def _kl_vae(channels: int = 4, **settings: Any) -> Any:
    sides = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    scaling = {"scaling_factor": 1.5, "shift_factor": 0.1}
    common = {"block_out_channels": [8, 12, 16], "layers_per_block": 1, "norm_num_groups": 4, **sides}
    return diffusers.AutoencoderKL(latent_channels=channels, **{**common, **scaling, **settings})


def _sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        caption_projection_dim=24,
        pooled_projection_dim=32,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
    )
    tokenizers = {f"tokenizer{end}": CLIPTokenizer.from_pretrained(TINY / "tokenizer") for end in ("", "_2")}
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_kl_vae(),
        text_encoder=_clip(),
        text_encoder_2=_clip(),
        text_encoder_3=_t5(),
        tokenizer_3=t5_tokenizer(),
        **tokenizers,
    )


def _flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_kl_vae(),
        text_encoder=_clip(CLIPTextModel),
        tokenizer=CLIPTokenizer.from_pretrained(TINY / "tokenizer"),
        text_encoder_2=_t5(),
        tokenizer_2=t5_tokenizer(),
    )


def _flux2() -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    sides = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = diffusers.AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=[8, 12, 16], layers_per_block=1, norm_num_groups=4, **sides
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return diffusers.Flux2KleinPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=_qwen3(Qwen3ForCausalLM),
        tokenizer=qwen_tokenizer(),
    )


def _zimage() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    return diffusers.ZImagePipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_kl_vae(),
        text_encoder=_qwen3(Qwen3Model),
        tokenizer=qwen_tokenizer(),
    )


def _qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.1, 2.0],
    )


def _krea2() -> Any:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        timestep_embed_dim=32,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=48,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400)
    return diffusers.Krea2Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=_qwen_vae(),
        text_encoder=_qwen3_vl(),
        tokenizer=qwen_tokenizer(),
        text_encoder_select_layers=(1, 3, 5),
    )


def _auraflow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        caption_projection_dim=24,
        pos_embed_max_size=144,
    )
    return diffusers.AuraFlowPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=_kl_vae(shift_factor=None),
        text_encoder=_umt5(),
        tokenizer=t5_tokenizer(),
    )


def _anima() -> Any:
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=24,
        adaln_lora_dim=8,
        max_size=(4, 32, 32),
        rope_scale=(1.0, 4.0, 4.0),
        extra_pos_embed_type=None,
    )
    conditioner = diffusers.AnimaTextConditioner(
        source_dim=WIDTH,
        target_dim=24,
        model_dim=16,
        num_layers=2,
        num_attention_heads=2,
        mlp_ratio=2.0,
        target_vocab_size=120,
    )
    parts = {
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": _qwen_vae(),
        "text_encoder": _qwen3(Qwen3Model),
        "tokenizer": qwen_tokenizer(),
        "text_conditioner": conditioner,
        "t5_tokenizer": t5_tokenizer(),
    }
    return pipeline_of("AnimaModularPipeline", parts)


def _qwen_image() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return diffusers.QwenImagePipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=_qwen_vae(),
        text_encoder=_qwen_vl(),
        tokenizer=qwen_tokenizer(),
    )


def _qwen_image_21() -> Any:
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.1, 2.0],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return diffusers.QwenImage21Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=vae,
        text_encoder=_qwen3_vl(Qwen3VLForConditionalGeneration),
        processor=text_processor(qwen_tokenizer()),
    )


PIPELINES: Mapping[str, Callable[[], Any]] = {
    "sd3": _sd3,
    "flux1": _flux,
    "flux2-klein": _flux2,
    "zimage": _zimage,
    "qwen-image": _qwen_image,
    "krea2": _krea2,
    "auraflow": _auraflow,
    "anima": _anima,
    "qwen-image-21": _qwen_image_21,
}
"""Name of a family → function that makes a random pipeline of it"""


def flow_pipeline(family: str, seed: int = 0) -> Any:
    """Make a random pipeline of a family; outputs that begin as zeros are random as well."""
    torch.manual_seed(seed)
    pipe = PIPELINES[family]()
    for value in pipe.transformer.parameters():
        if value.ndim > 1 and not value.any():
            nn.init.normal_(value, std=0.05)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow_folder(family: str, folder: Path) -> Path:
    """Write a random pipeline of a family to `folder`, and return it."""
    pipe = flow_pipeline(family)
    pipe.save_pretrained(str(folder), **({"overwrite_modular_index": True} if is_modular(pipe) else {}))
    return folder


def wide_klein(folder: Path, singles: int) -> Path:
    """Write FLUX.2 klein 4B at its real widths: one of 5 double blocks, some of 20 single ones, 4 layers of Qwen3."""
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=singles,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 4, "vocab_size": 300}
    diffusers.Flux2KleinPipeline(
        transformer=transformer.bfloat16(),
        vae=diffusers.AutoencoderKLFlux2().bfloat16(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**heads, **sizes)).bfloat16(),
        tokenizer=qwen_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ).save_pretrained(folder)
    return folder
