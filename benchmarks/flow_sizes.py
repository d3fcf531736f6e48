"""Memory of training on flow-matching bases of published sizes: ``python -m benchmarks.flow_sizes``.

The bases have their published configurations and no weights: `diffgraft plan` computes on the device ``meta``. It takes
five minutes.
"""

import re
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5Tokenizer,
)
from transformers.initialization import no_init_weights

import diffgraft as dg
from diffgraft.bases import Base
from diffgraft.bases.registry import families
from diffgraft.demo.subject import POODLE
from diffgraft.files import write_text

Parts = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
RECIPES = {
    "flux2-klein": "klein",
    "zimage": "zimage",
    "qwen-image": "qwen",
    "krea2": "krea2",
    "anima": "anima",
    "qwen-image-21": "qwen21",
}
"""Family → first word of the names of its recipes"""
HEAD = """# Memory of training on large bases

`python -m benchmarks.flow_sizes` wrote this page: what `diffgraft plan` says of one step of each recipe on its base, a
picture of 1024 × 1024 pixels with gradient checkpointing, when the text encoder has left the memory. The bases have
their published configurations, but no weights, and no step was taken. *Weights* is `quantize=`, and *swapped* the
number of blocks that wait in main memory, `block_swap=`.

| recipe | parameters of the transformer | weights | swapped | trained | memory | of it frozen weights | activations |
|-|-|-|-|-|-|-|-|
"""
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Any:
    """A tokenizer of Qwen's class with a token for each byte, and a short chat template."""
    vocabulary = {character: place for place, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = _CHAT
    return tokenizer


def t5_tokenizer() -> Any:
    """A tokenizer of T5's class with a token for each letter and mark of ASCII."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_letters, *string.punctuation]
    return T5Tokenizer(vocab=[(piece, -float(place)) for place, piece in enumerate(pieces)], extra_ids=0)


def _qwen3_4b() -> Qwen3Config:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
    return Qwen3Config(**heads, **sizes, tie_word_embeddings=True)


def _flux2_klein() -> Parts:
    return {
        "transformer": diffusers.Flux2Transformer2DModel(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=7680,
            guidance_embeds=False,
        ),
        "vae": diffusers.AutoencoderKLFlux2(),
        "text_encoder": Qwen3ForCausalLM(_qwen3_4b()),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def _zimage() -> Parts:
    sides = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return {
        "transformer": diffusers.ZImageTransformer2DModel(),
        "vae": diffusers.AutoencoderKL(
            latent_channels=16, block_out_channels=[128, 256, 512, 512], layers_per_block=2, **sides
        ),
        "text_encoder": Qwen3Model(_qwen3_4b()),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    }


def _qwen_image() -> Parts:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "rope_parameters": rope}
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064, **heads}
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584}
    return {
        "transformer": diffusers.QwenImageTransformer2DModel(),
        "vae": diffusers.AutoencoderKLQwenImage(),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    }


def _krea2() -> Parts:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560}
    config = Qwen3VLConfig(
        text_config={**heads, **sizes, "rope_parameters": rope},
        vision_config={**vision, "deepstack_visual_indexes": [5, 11, 17]},
    )
    return {
        "transformer": diffusers.Krea2Transformer2DModel(),
        "vae": diffusers.AutoencoderKLQwenImage(),
        "text_encoder": Qwen3VLModel(config),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
    }


def _qwen_image_21() -> Parts:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    sizes = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936}
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096}
    config = Qwen3VLConfig(
        text_config={**heads, **sizes, "rope_parameters": rope},
        vision_config={**vision, "deepstack_visual_indexes": [8, 16, 24]},
    )
    return {
        "transformer": diffusers.QwenImage21Transformer2DModel(),
        "vae": diffusers.AutoencoderKLQwenImage21(),
        "text_encoder": Qwen3VLForConditionalGeneration(config),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    }


def _anima() -> Parts:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151936}
    return {
        "transformer": diffusers.CosmosTransformer3DModel(
            num_attention_heads=16, rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None
        ),
        "vae": diffusers.AutoencoderKLQwenImage(),
        "text_encoder": Qwen3Model(Qwen3Config(**heads, **sizes, tie_word_embeddings=True)),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "others": {"text_conditioner": diffusers.AnimaTextConditioner(), "t5_tokenizer": t5_tokenizer()},
    }


REAL: Mapping[str, Callable[[], Parts]] = {
    "flux2-klein": _flux2_klein,
    "zimage": _zimage,
    "qwen-image": _qwen_image,
    "krea2": _krea2,
    "anima": _anima,
    "qwen-image-21": _qwen_image_21,
}
"""Name of a family → function that makes its parts; FLUX.2 klein is the one with 4 billion parameters"""


def real_base(family: str) -> Base:
    """Return a base in its published configuration, in bfloat16 on the device ``meta``."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        parts = REAL[family]()
    base = Base(name=f"a real {family}", family=families()[family], tokenizer=qwen_tokenizer(), **parts)
    return base.to("meta", torch.bfloat16)


def planned(recipe: str, base: Base, quantize: str, block_swap: int = 0) -> dict[str, str]:
    """Return what `plan` says of a recipe on a base: its line on memory, in parts, and the number of parameters."""
    settings = {"subject": "dog"} if recipe.endswith("subject") else {}
    with TemporaryDirectory() as folder:
        plan = str(
            dg.plan(
                recipe,
                base=base,
                images=str(POODLE.folder / "learn"),
                output=f"{folder}/run",
                quantize=quantize,
                block_swap=block_swap,
                previews=False,
                sample_every=0,
                **settings,
            )
        )
    found = re.search(
        r"trained +(?P<trained>[\d,]+) parameters.*about (?P<memory>[\d.]+ \w+) on each device: "
        r"(?P<frozen>[\d.]+ \w+) of frozen weights, .* (?P<activations>[\d.]+ \w+) of activations",
        plan,
        re.DOTALL,
    )
    assert found is not None, plan
    return found.groupdict()


def main() -> None:
    """Write the page."""
    rows = []
    for family, first in RECIPES.items():
        for quantize, swaps in (("none", False), ("none", True), ("int8", False), ("nf4", False), ("nf4", True)):
            base = real_base(family)
            blocks = [part for part in base.denoiser.modules() if type(part).__name__ in base.family.checkpointed]
            swapped = len(blocks) // 2 if swaps else 0
            billions = sum(value.numel() for value in base.denoiser.parameters()) / 1e9
            told = planned(f"{first}-subject", base, quantize, swapped)
            weights = "bfloat16" if quantize == "none" else quantize
            cells = [f"`{first}-subject`", f"{billions:.2f} billion", weights, str(swapped)]
            cells += [told[key] for key in ("trained", "memory", "frozen", "activations")]
            rows.append("| " + " | ".join(cells) + " |")
            print(rows[-1], flush=True)
    write_text(RESULTS / "flow-sizes.md", HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
