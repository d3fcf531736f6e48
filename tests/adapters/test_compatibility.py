"""What is said of files that other programs take for something else, and what full differences become for them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.formats.compatibility import compatibility_notes
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.adapters.method import Spec
from diffgraft.adapters.methods.full import FullDelta
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.ops.convert import convert
from diffgraft.adapters.ops.resize import resize
from diffgraft.adapters.registry import get_method, read_delta, written_dialects
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError

PATH, TEXT = "unet.mid_block.attentions.0.proj_in", "text_encoder.encoder.layers.0.self_attn."
LORA = low_rank(torch.ones(2, 5), torch.ones(7, 2), 1.0)


def adapter_of(*deltas: Delta, path: str = PATH, **more: Any) -> Adapter:
    return Adapter({path.replace("0", str(place)): (delta,) for place, delta in enumerate(deltas)}, **more)


def said(adapter: Adapter, dialect: str) -> str:
    return " | ".join(compatibility_notes(adapter, dialect))


@pytest.mark.parametrize("dialect", ["kohya", "lycoris", "webui"])
def test_a_plain_lora_under_kohya_s_names_is_what_it_is_everywhere(dialect: str) -> None:
    assert compatibility_notes(adapter_of(LORA, LORA), dialect) == []
    assert compatibility_notes(Adapter({f"{TEXT}{name}": (LORA,) for name in ("q_proj", "out_proj")}), dialect) == []


@pytest.mark.parametrize("dialect", ["kohya", "lycoris"])
def test_what_other_programs_misread_is_said(dialect: str) -> None:
    outputs, inputs = DoraDelta(LORA, torch.ones(7)), DoraDelta(LORA, torch.ones(1, 5))
    assert "webui and InvokeAI take its norms of outputs for norms of inputs" in said(adapter_of(outputs), dialect)
    assert "sd-scripts and diffusers ignore its norms" in said(adapter_of(inputs), dialect)
    assert "norms of inputs, which is far" not in said(adapter_of(inputs), dialect)
    tucker = low_rank(torch.ones(2, 5, 1, 1), torch.ones(7, 2, 1, 1), 1.0, torch.ones(2, 2, 3, 3))
    assert "do not read lora_mid" in said(adapter_of(tucker), dialect)
    other = low_rank(torch.ones(2, 5), torch.ones(7, 2), 2.0)
    assert "but diffusers uses the most frequent one for all" in said(adapter_of(LORA, other), dialect)
    assert "only if self_attn.out_proj is among them" in said(adapter_of(LORA, path=f"{TEXT}q_proj"), dialect)
    word = {"<zorp>": {"text_encoder": torch.ones(2, 8)}}
    assert "`--only <zorp> --to webui` writes a word" in said(adapter_of(LORA, tokens=word), dialect)
    norm = FullDelta({"diff": torch.ones(7), "diff_b": torch.ones(7)})
    assert "1 modules are norms" in said(adapter_of(norm, path="text_encoder.final_layer_norm"), dialect)
    assert said(adapter_of(norm, path="unet.conv_norm_out"), dialect) == (
        "diffusers reads only LoRA under these names, and not full differences."
    )


KRON = {"lokr_w1": torch.ones(7, 2), "lokr_t2": torch.ones(3, 3, 3, 3), "lokr_w2_a": torch.ones(3, 2)}


@pytest.mark.parametrize(
    ("kind", "leaves", "others"),
    [
        (
            "loha",
            {
                f"hada_w{s}": torch.ones(7, 3) if s[-1] == "a" else torch.ones(3, 5)
                for s in ("1_a", "1_b", "2_a", "2_b")
            },
            "",
        ),
        (
            "lokr",
            {**KRON, "lokr_w2_b": torch.ones(3, 5)},
            "hold a LoKr in its Tucker variant, on which ComfyUI fails",
        ),
        ("ia3", {"weight": torch.ones(7), "on_input": torch.tensor(0)}, "hold (IA)³, which webui or ComfyUI does not"),
        (
            "oft",
            {"oft_blocks": torch.ones(2, 4, 4), "rescale": torch.ones(8, 1)},
            "a rescaling, which ComfyUI ignores",
        ),
        ("oft-inputs", {"oft_R": torch.ones(2, 3)}, "hold OFT of inputs, which webui or ComfyUI does not read"),
    ],
)
def test_what_is_said_of_other_kinds_is_what_webui_s_files_are_refused_for(
    kind: str, leaves: dict[str, torch.Tensor], others: str, tmp_path: Path
) -> None:
    adapter = adapter_of(read_delta(kind, leaves, 1.0), metadata={"base": {"family": "sd1"}})
    assert "diffusers reads only LoRA under these names" in said(adapter, "kohya")
    assert others in said(adapter, "kohya")
    if others:
        with pytest.raises(DiffgraftError, match=re.escape(others.removeprefix("hold "))):
            adapter.save(tmp_path / "a.safetensors", "webui")
    else:
        adapter.save(tmp_path / "a.safetensors", "webui")


def test_a_bias_beside_a_lora_and_half_an_attention_of_openclip_are_left_out_by_webui(tmp_path: Path) -> None:
    beside = Adapter({PATH: (LORA, FullDelta({"diff_b": torch.ones(7)}))}, {"base": {"family": "sd1"}})
    assert "webui and diffusers ignore differences of biases beside other factors" in said(beside, "kohya")
    half = adapter_of(LORA, path="text_encoder_2.encoder.layers.0.self_attn.q_proj")
    assert "webui ignores q_proj of text_encoder_2.encoder.layers.0.self_attn" in said(half, "kohya")
    for adapter in (beside, half):
        with pytest.raises(DiffgraftError, match="webui"):
            adapter.save(tmp_path / "a.safetensors", "webui")


def test_what_a_layout_is_not_read_by_is_said() -> None:
    assert "do not read diffusers' layout: they need --to kohya" in written_dialects()["diffusers"].note
    assert "do not open peft's folders" in written_dialects()["peft"].note
    assert "No other program reads" in written_dialects()["diffgraft"].note
    of_xl = adapter_of(LORA, metadata={"base": {"family": "sdxl"}})
    assert "webui assumes an adapter of Stable Diffusion 1.x, but the base is sdxl" in said(of_xl, "lycoris")
    assert said(of_xl, "kohya") == ""
    word = Adapter({}, tokens={"<x>": {"text_encoder": torch.ones(1, 8)}})
    assert "call the word by the file's name, x, instead of <x>" in " ".join(compatibility_notes(word, "webui", "x"))
    assert compatibility_notes(word, "webui", "<x>") == []
    assert "InvokeAI reads words" in said(Adapter({}, tokens={"x": {"text_encoder": torch.ones(1, 8)}}), "embedding")
    assert compatibility_notes(Adapter({}, tokens={"x": {"text_encoder": torch.ones(1, 8)}}), "webui") == []


def test_converting_says_it(tmp_path: Path) -> None:
    file = adapter_of(DoraDelta(LORA, torch.ones(7))).save(tmp_path / "a.safetensors", "diffgraft")
    assert any("webui and InvokeAI" in one for one in convert(file, tmp_path / "b.safetensors", "kohya").remarks)
    assert any("they need --to kohya" in one for one in convert(file, tmp_path / "c.safetensors", "auto").remarks)


@pytest.fixture(scope="module")
def full(base: Base) -> Adapter:
    """A full difference of the embedded base's text encoder, every number of it other than zero."""
    method = get_method("full")
    live = method.attach(base, Spec({"text_encoder": []}, 1, 1.0, 0, method.read_options({})))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in live.trainable().values():
            value.add_(torch.randn(value.shape, generator=generator) * 0.01)
    adapter = live.adapter({"method": "full", "base": {"family": "sd1"}})
    live.detach()
    return adapter


def test_full_differences_that_webui_and_comfyui_leave_out_are_refused_for_them(full: Adapter, tmp_path: Path) -> None:
    with pytest.raises(DiffgraftError, match="is a full difference of a norm or an embedding in a text encoder"):
        full.save(tmp_path / "a.safetensors", "webui")
    assert not list(tmp_path.iterdir())
    layers = {path: own for path, own in full.deltas.items() if path.endswith(("_proj", ".fc1", ".fc2"))}
    file = Adapter(layers, full.metadata).save(tmp_path / "b.safetensors", "webui")
    known = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert {key.split(".")[0].removeprefix("lora_te_text_model_encoder_layers_")[2:] for key in load_file(file)} == {
        *(f"self_attn_{name}" for name in known if name.endswith("_proj")),
        *("mlp_fc1", "mlp_fc2"),
    }


def test_the_last_norm_of_a_unet_has_the_name_that_webui_knows(tmp_path: Path) -> None:
    path = "unet.conv_norm_out"
    norm = FullDelta({"diff": torch.randn(7), "diff_b": torch.randn(7)})
    file = adapter_of(norm, path=path, metadata={"base": {"family": "sd1"}}).save(tmp_path / "a.safetensors", "webui")
    assert set(load_file(file)) == {"lora_unet_out_0.w_norm", "lora_unet_out_0.b_norm"}
    assert load_adapter(file).modules == [path]


def test_reduced_full_differences_hold_no_lora_of_an_embedding(full: Adapter, base: Base) -> None:
    assert any(path.endswith("token_embedding") for path in full.deltas)
    done = resize(full, RankBudget(2))
    assert not any("embedding" in path for path in done.adapter.deltas)
    assert {path for path in done.dropped if "embedding" in path} == {
        "text_encoder.embeddings.token_embedding",
        "text_encoder.embeddings.position_embedding",
    }
    method = get_method("full")
    live = method.attach(base, Spec({"text_encoder": []}, 1, 1.0, 0, method.read_options({"rank": 2})))
    with torch.no_grad():
        for value in live.trainable().values():
            value.add_(torch.ones_like(value))
    reduced = live.adapter({})
    live.detach()
    assert reduced.deltas
    assert not any("embedding" in path for path in reduced.deltas)
