"""What tests share: the embedded base, a short run on it, and small random bases of other shapes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffgraft.bases import Base, load_base
from diffgraft.demo.subject import POODLE
from diffgraft.trainers.run import Run, train


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def base() -> Base:
    """The embedded base; a test that changes it must put it back."""
    return load_base("tiny")


@pytest.fixture(scope="session")
def pictures() -> Path:
    """The five pictures of the demo's subject."""
    return POODLE.folder / "learn"


SHORT = {"subject": "dog", "steps": 6, "checkpoint_every": 3, "seed": 3, "sample_every": 0, "prior": {"images": 4}}


@pytest.fixture(scope="session")
def short_run(base: Base, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps of DreamBooth: enough for a file with non-zero deltas, not enough to have learnt."""
    return train("subject", base=base, images=pictures, output=tmp_path_factory.mktemp("runs") / "short", **SHORT)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a random Stable Diffusion XL with every width different."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from diffgraft.bases.loading import TINY

    torch.manual_seed(5)

    def text(width: int, projection: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=width + 8,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=projection,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )

    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 24),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 + 48,
        attention_head_dim=4,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=6 * 6 + 40,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(text(32, 32)),
        text_encoder_2=CLIPTextModelWithProjection(text(48, 40)),
        tokenizer=CLIPTokenizer.from_pretrained(TINY / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(TINY / "tokenizer"),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("bases") / "small-xl"
    pipe.save_pretrained(folder)
    return folder


def small_sd1(folder: Path) -> Path:
    """A random model of Stable Diffusion 1.x's shape (four levels, two layers a block), small and unequal in width."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from diffgraft.bases import loading

    torch.manual_seed(8)

    def configured(part: str, **small: object) -> dict[str, object]:
        return {**json.loads((loading.CONFIGS / "sd1" / part / "config.json").read_text("utf-8")), **small}

    unet = configured(
        "unet", block_out_channels=[8, 16, 24, 24], cross_attention_dim=20, norm_num_groups=4, attention_head_dim=4
    )
    vae = configured("vae", block_out_channels=[4, 8, 12, 12], norm_num_groups=4)
    text = configured("text_encoder", hidden_size=20, intermediate_size=28, num_attention_heads=4, num_hidden_layers=2)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(vae),
        unet=UNet2DConditionModel.from_config(unet),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=CLIPTokenizer.from_pretrained(loading.TINY / "tokenizer"),
        scheduler=PNDMScheduler.from_pretrained(loading.CONFIGS / "sd1" / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder
