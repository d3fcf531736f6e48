"""Adapters on diffusers' pipelines for other tasks: depth to image, upscaling, variations, instructions."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import diffgraft as dg
from diffgraft.adapters.method import Spec
from diffgraft.adapters.registry import get_method
from diffgraft.bases import load_base
from diffgraft.bases.layers import choose_layers
from tests.adapters.toys import shake

SIZE = (64, 48)


def parts(channels: int, **more: Any) -> dict[str, Any]:
    """Small random networks, of which the UNet takes `channels`."""
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=49408
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(32, 48),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        norm_num_groups=8,
        attention_head_dim=4,
        **more,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 24, 32, 32),
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    tokenizer = load_base("tiny").tokenizer
    return {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": text.eval(), "tokenizer": tokenizer}


def depth(image: Image.Image) -> tuple[Any, dict[str, Any]]:
    pipe = StableDiffusionDepth2ImgPipeline(
        **parts(5), scheduler=DDIMScheduler(), depth_estimator=None, feature_extractor=None
    )
    return pipe, {"image": image, "depth_map": torch.rand(1, 48, 64, generator=torch.Generator().manual_seed(1))}


def upscaling(image: Image.Image) -> tuple[Any, dict[str, Any]]:
    made = parts(7, num_class_embeds=1000)
    made["vae"].register_to_config(scaling_factor=0.08333)
    pipe = StableDiffusionUpscalePipeline(**made, scheduler=DDIMScheduler(), low_res_scheduler=DDPMScheduler())
    return pipe, {"image": image.resize((16, 12))}


def instructions(image: Image.Image) -> tuple[Any, dict[str, Any]]:
    pipe = StableDiffusionInstructPix2PixPipeline(
        **parts(8),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"image": image}


def variations(image: Image.Image) -> tuple[Any, dict[str, Any]]:
    made = parts(4, class_embed_type="projection", projection_class_embeddings_input_dim=40)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, projection_dim=20, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    pipe = StableUnCLIPImg2ImgPipeline(
        **made,
        scheduler=DDIMScheduler(),
        feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        image_normalizer=StableUnCLIPImageNormalizer(20),
        image_noising_scheduler=DDPMScheduler(),
    )
    return pipe, {"image": image}


@pytest.mark.parametrize("method", ["lora", "loha", "full"])
@pytest.mark.parametrize("task", [depth, upscaling, instructions, variations])
def test_an_adapter_changes_what_is_drawn_and_nothing_afterwards(task: Any, method: str) -> None:
    image = Image.effect_mandelbrot(SIZE, (-2, -1.5, 1, 1.5), 50).convert("RGB")
    pipe, options = task(image)
    pipe.set_progress_bar_config(disable=True)
    made = get_method(method)
    read = made.read_options({})
    paths = {"unet": choose_layers("unet", pipe.unet, made.layers_under(read))}
    live = made.attach(pipe, Spec(paths, 2, 2.0, 0, read, "", ""))
    shake(live, size=0.2)
    adapter = live.adapter({"method": method})
    live.detach()

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        drawn = pipe(prompt="a dog", num_inference_steps=2, generator=generator, output_type="np", **options)
        return np.asarray(drawn.images)

    before = draw()
    with dg.graft(pipe, {adapter: 1.0}):
        assert np.abs(draw() - before).max() > 1e-3
    assert np.array_equal(draw(), before)
