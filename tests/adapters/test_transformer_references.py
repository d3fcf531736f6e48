"""Files of transformers do in diffusers and in peft what they do here: weights after loading, and outputs."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from tests.adapters.test_transformer_files import (
    FAMILIES,
    GENERATOR,
    distance,
    drawn,
    linear,
    made,
    merged,
    pipeline,
    written,
)
from tests.bases.test_original_layout import LAYOUTS, original_state

UNREAD = {
    # the width of fused layers of single blocks is fixed in diffusers' converter, and layers outside of blocks get lost
    ("flux1", "kohya"): (
        *("proj_mlp", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"),
        *("embed", "norm_out", "transformer.proj_out"),
    ),
    ("flux2-klein", "kohya"): ("modulation", "norm_out", "embed"),
    ("flux2-klein", "comfyui"): ("norm_out",),  # shift and scale are not exchanged
    ("zimage", "kohya"): ("2-1", "embedder"),
    ("qwen-image", "kohya"): (),
    ("qwen-image", "comfyui"): (),
    ("krea2", "comfyui"): (),
    ("anima", "comfyui"): (),
    ("qwen-image-21", "kohya"): ("gate_layer", "img_mlp.proj", "txt_in", "modulation"),  # no fused layer is known there
    ("qwen-image-21", "comfyui"): ("gate_layer", "img_mlp.proj"),
    **{(family, "diffusers"): () for family in FAMILIES},
}
"""Family and dialect → parts of paths of layers that diffusers' own conversion of such files leaves out, or misreads"""


@pytest.fixture(autouse=True)
def _same_values_in_every_order_of_tests() -> None:
    GENERATOR.manual_seed(5)


def loaded_by_diffusers(family: str, folder: Path, name: str) -> Any:
    pipe = copy.deepcopy(pipeline(family))
    pipe.load_lora_weights(folder, weight_name=name, adapter_name="a")
    return pipe


@pytest.mark.parametrize(("family", "dialect"), UNREAD)
def test_diffusers_loads_what_is_written(family: str, dialect: str, tmp_path: Path) -> None:
    unread = UNREAD[family, dialect]
    for kind in ("lora", "lora, uneven"):
        whole = made(family, kind)
        kept = {path: own for path, own in whole.deltas.items() if not any(part in path for part in unread)}
        adapter = Adapter(kept, whole.metadata)
        assert len(kept) > 10
        file = written(adapter, tmp_path, dialect)
        pipe = loaded_by_diffusers(family, tmp_path, file.name)
        pipe.fuse_lora(components=["transformer"])
        pipe.unload_lora_weights()
        for again in (adapter, load_adapter(file)):
            assert distance(pipe.transformer.state_dict(), merged(family, again).state_dict()) < 1e-5


def output(network: Any) -> Tensor:
    """The output of FLUX.2's transformer for a picture of 4 × 4 tokens and 5 of text."""
    generator = torch.Generator().manual_seed(1)
    tokens, text = (torch.randn(1, n, c, generator=generator) for n, c in ((16, 16), (5, 96)))
    with torch.no_grad():
        found: Tensor = network(
            hidden_states=tokens,
            encoder_hidden_states=text,
            timestep=torch.tensor([0.5]),
            img_ids=torch.arange(64).reshape(16, 4),
            txt_ids=torch.zeros(5, 4),
            return_dict=False,
        )[0]
    return found


def test_a_lokr_of_fused_layers_does_what_diffusers_does_by_fusing_the_base(tmp_path: Path) -> None:
    """ai-toolkit's LoKr for FLUX.2, for which diffusers fuses queries, keys and values of the whole base."""
    state = original_state(LAYOUTS["flux2-klein"], pipeline("flux2-klein").transformer)
    tensors: dict[str, Tensor] = {}
    for key, weight in state.items():
        path = key.removesuffix(".weight")
        if key.endswith("weight") and "blocks" in path and weight.ndim == 2:
            tensors[f"diffusion_model.{path}.lokr_w1"] = drawn(4, 4)
            tensors[f"diffusion_model.{path}.lokr_w2"] = drawn(weight.shape[0] // 4, weight.shape[1] // 4)
    save_file(tensors, tmp_path / "theirs.safetensors")
    theirs = loaded_by_diffusers("flux2-klein", tmp_path, "theirs.safetensors").transformer
    ours = merged("flux2-klein", load_adapter(tmp_path / "theirs.safetensors"))
    before = output(pipeline("flux2-klein").transformer)
    wanted = output(theirs)
    assert float((wanted - before).abs().max()) > 0.01
    torch.testing.assert_close(output(ours), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_peft(family: str, tmp_path: Path) -> None:
    """A folder that peft writes for the transformer alone, and a written one that peft loads."""
    layers = list(linear(family))[::2]
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=layers, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(pipeline(family).transformer), config)
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    assert set(adapter.deltas) == {f"transformer.{path}" for path in layers}
    wanted = model.merge_and_unload().state_dict()
    assert distance(merged(family, adapter).state_dict(), wanted) < 1e-5
    written(adapter, tmp_path, "peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(pipeline(family).transformer), tmp_path / "peft/transformer")
    assert distance(again.merge_and_unload().state_dict(), wanted) < 1e-5
    # the same keys in a file alone have the scale 1, as in ComfyUI and diffusers
    (tmp_path / "theirs" / "adapter_config.json").unlink()
    alone = load_adapter(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {delta.alpha for (delta,) in alone.deltas.values()} == {3.0}
