"""Transformers in single files: every layout gives the weights of the folder, to the bit."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import diffgraft as dg
from diffgraft.bases import Base, load_base
from diffgraft.bases.checkpoint_files import is_checkpoint
from diffgraft.bases.gguf_files import open_gguf
from diffgraft.bases.ldm_keys import ldm_vae_key
from diffgraft.bases.meta_base import meta_base
from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.original_weights import find_weights, original_state_dict
from diffgraft.bases.registry import families
from diffgraft.bases.shape_table import ShapeTable
from diffgraft.bases.transformer_files import open_transformer
from diffgraft.bases.weights import open_weights
from diffgraft.cli.main import app
from diffgraft.errors import DiffgraftError
from diffgraft.generation.merge_checkpoint import merge_checkpoint
from diffgraft.generation.metadata import save_drawing
from diffgraft.generation.regenerate import Sources, regenerate
from tests.bases.test_original_layout import REAL
from tests.conftest import flow_folder_of
from tests.recipes import SUBJECT
from tests.trainers.interrupt_helpers import interrupted_after

SIZES: Mapping[str, tuple[str, Callable[[], nn.Module]]] = {
    **{family: (family, make) for family, make in REAL.items()},
    "sd3 medium": (
        "sd3",
        lambda: diffusers.SD3Transformer2DModel(
            num_layers=24, pos_embed_max_size=192, num_attention_heads=24, caption_projection_dim=1536
        ),
    ),
    "flux schnell": ("flux1", diffusers.FluxTransformer2DModel),
    "klein 9B": (
        "flux2-klein",
        lambda: diffusers.Flux2Transformer2DModel(
            num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, guidance_embeds=False
        ),
    ),
}
"""Published sizes: name → family, and its transformer"""
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")


def layout_of(family: str) -> OriginalLayout:
    layout = families()[family].original
    assert layout is not None
    return layout


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def write(path: Path, state: Mapping[str, Tensor], header: dict[str, str] | None = None) -> Path:
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path, header)
    return path


def original(base: Base, prefix: str = "") -> dict[str, Tensor]:
    state = original_state_dict(layout_of(base.family.name), base.denoiser.state_dict())
    return {prefix + name: value for name, value in state.items()}


def plain(value: Any) -> Any:
    return [*value] if isinstance(value, tuple) else value


def same_bits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        # the original layout has some tables on one axis
        assert torch.equal(value.reshape(wanted[name].shape), wanted[name]), name


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_are_told_by_names_and_shapes(size: str) -> None:
    """Each weight has one place in either layout, and the shapes give the configuration back."""
    family, make = SIZES[size]
    with torch.device("meta"):
        network: Any = make()
    state = network.state_dict()
    theirs = original_state_dict(layout_of(family), state)
    for named in (theirs, state):
        places, unknown = find_weights(layout_of(family), shapes_of(named))
        assert not unknown
        assert places.keys() == state.keys()
        assert {place.key for place in places.values()} == named.keys()
        counts = dict.fromkeys(named, 0)
        for name, place in places.items():
            counts[place.key] += state[name].numel()
        assert counts == {key: value.numel() for key, value in named.items()}
        shapes = {name: (place.stop - place.start, *named[place.key].shape[1:]) for name, place in places.items()}
        told = families()[family].denoiser_config(ShapeTable("file", shapes), {})
        with torch.device("meta"):
            again: Any = type(network).from_config({**told})
        assert shapes_of(again.state_dict()) == shapes_of(state)
        different = {key for key in network.config if plain(again.config[key]) != plain(network.config[key])}
        different = {key for key in different if key[0] != "_"}
        assert different <= {"out_channels", "all_patch_size", "all_f_patch_size", "dual_attention_layers"}


def test_a_file_of_any_layout_gives_the_base_of_the_folder(flow_base: Base, tmp_path: Path) -> None:
    wanted = flow_base.denoiser.state_dict()
    states = [*(original(flow_base, start) for start in PREFIXES), wanted]
    files = [write(tmp_path / f"{place}.safetensors", state) for place, state in enumerate(states)]
    for file in files:
        with open_transformer(file) as opened:
            assert opened is not None
            assert opened.family is flow_base.family
            same_bits({name: read() for name, shape, read in opened.weights()}, wanted)
    base = load_base(files[0], components=flow_base.name)
    assert base.hash == flow_base.hash
    assert base.components_from == flow_base.name
    same_bits(base.denoiser.state_dict(), wanted)
    if flow_base.family.name != "flux1":  # diffusers' reader of that one only knows the published width
        theirs = type(flow_base.denoiser).from_single_file(
            str(files[0]), config=flow_base.name, subfolder="transformer", local_files_only=True
        )
        same_bits(theirs.state_dict(), wanted)


def bundle(base: Base) -> dict[str, Tensor]:
    """All networks of a base under the names of ComfyUI's files."""
    state = original(base, "model.diffusion_model.")
    for part, prefixes in base.family.bundled.items():
        network = getattr(base, part)
        for name, value in network.state_dict().items():
            if part == "vae":
                theirs = ldm_vae_key(name, len(network.config.block_out_channels))
                is_convolution = ".attn_1." in theirs and value.ndim == 2
                state[prefixes[0] + theirs] = value[:, :, None, None] if is_convolution else value
            elif name != "encoder.embed_tokens.weight":
                state[prefixes[0] + name] = value
        if part == "text_encoder":
            state[f"{prefixes[0]}logit_scale"] = torch.ones(())
    return state


def test_a_file_with_all_parts_needs_only_their_configurations(flow_base: Base, tmp_path: Path) -> None:
    state = bundle(flow_base)
    if "vae" not in flow_base.family.bundled:
        file = write(tmp_path / "all.safetensors", {**state, "vae.conv.weight": torch.ones(2, 3)})
        assert "holds 1 tensors beside its transformer, such as vae.conv.weight" in refused(file, flow_base.name)
        return
    bare = shutil.copytree(flow_base.name, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    base = load_base(write(tmp_path / "all.safetensors", state), components=bare)
    assert base.hash == flow_base.hash
    assert base.vae_hash == flow_base.vae_hash
    for damage, answer in (
        ({"vae.conv.weight": torch.ones(2, 3)}, "vae.conv.weight, which the vae of the components does not have"),
        ({name: None for name in state if name.endswith("decoder.conv_out.bias")}, "without 1 of the weights of a vae"),
        (
            {name: torch.ones(2) for name in state if name.endswith("decoder.conv_out.bias")},
            "conv_out.bias of shape [2]",
        ),
    ):
        own = {name: value for name, value in {**state, **damage}.items() if value is not None}
        if "vae.conv.weight" in damage:
            own = {name.replace("first_stage_model.", "vae."): value for name, value in own.items()}
        assert answer in refused(write(tmp_path / "all.safetensors", own), flow_base.name, by_plan=False)


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(flow_folder_of("flux2-klein", tmp_path_factory))


def float8_values(kind: torch.dtype) -> np.ndarray[Any, Any]:
    """The number of each byte by the definition of the format: sign, 4 or 5 bits of exponent, 3 or 2 of mantissa."""
    mantissa = 3 if kind == torch.float8_e4m3fn else 2
    bias, values = 2 ** (6 - mantissa) - 1, np.zeros(256, np.float32)
    for byte in range(256):
        exponent, rest = (byte & 127) >> mantissa, byte & (2**mantissa - 1)
        size = (rest / 2**mantissa + (exponent > 0)) * 2.0 ** (max(exponent, 1) - bias)
        values[byte] = -size if byte > 127 else size
    return values


class Scaled:
    """The weights of a base in float8 with scales, as files of ComfyUI have them, and dequantized by numpy."""

    def __init__(self, base: Base, kind: torch.dtype, scale: str, prefix: str = "", by_row: bool = False) -> None:
        self.stored: dict[str, Tensor] = {}
        self.dequantized: dict[str, Tensor] = {}
        self.layers: list[str] = []
        for name, value in original(base, prefix).items():
            if value.ndim != 2:
                self.stored[name] = self.dequantized[name] = value.to(torch.bfloat16)
                continue
            top = value.abs().amax(1, keepdim=True) if by_row else value.abs().max()
            factor = (top / (57344.0 if kind == torch.float8_e5m2 else 448.0)).float()
            numbers = (value / factor).to(kind)
            layer = name.removesuffix(".weight")
            self.layers.append(layer)
            self.stored |= {name: numbers, f"{layer}.{scale}": factor}
            exact = float8_values(kind)[numbers.view(torch.uint8).numpy()] * factor.numpy()
            self.dequantized[name] = torch.from_numpy(exact)


def text_tensor(content: object) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("generation", ["scaled_fp8", "comfy_quant", "header", "plain"])
def test_float8_is_dequantized_as_by_its_definition(generation: str, klein: Base, tmp_path: Path) -> None:
    kind = torch.float8_e5m2 if generation == "header" else torch.float8_e4m3fn
    prefix = "model.diffusion_model." if generation == "scaled_fp8" else ""
    scale = "scale_weight" if generation == "scaled_fp8" else "weight_scale"
    scaled = Scaled(klein, kind, scale, prefix, by_row=generation == "comfy_quant")
    stored, header = dict(scaled.stored), None
    if generation == "scaled_fp8":
        stored[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=kind)
        stored |= {f"{layer}.scale_input": torch.ones(()) for layer in scaled.layers}
    elif generation == "comfy_quant":
        stored |= {f"{layer}.comfy_quant": text_tensor({"format": "float8_e4m3fn"}) for layer in scaled.layers}
        stored |= {f"{layer}.input_scale": torch.ones(1) for layer in scaled.layers}
    elif generation == "header":
        formats = {layer: {"format": "float8_e5m2"} for layer in scaled.layers}
        header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": formats})}
    else:
        stored = {name: value for name, value in stored.items() if not name.endswith("weight_scale")}
        scaled.dequantized = {name: value.float() for name, value in stored.items()}
    file = write(tmp_path / "scaled.safetensors", stored, header)
    wanted = write(tmp_path / "wanted.safetensors", {k: v.float() for k, v in scaled.dequantized.items()})
    base, whole = (load_base(path, components=klein.name) for path in (file, wanted))
    same_bits(base.denoiser.state_dict(), whole.denoiser.state_dict())
    assert base.denoiser.dtype == torch.float32
    assert base.hash == whole.hash != klein.hash
    if generation == "scaled_fp8":
        half = load_base(file, None, components=klein.name)
        assert half.denoiser.dtype == torch.bfloat16
        assert half.hash == base.hash
        same_bits(half.denoiser.state_dict(), {k: v.bfloat16() for k, v in base.denoiser.state_dict().items()})


def write_gguf(path: Path, state: Mapping[str, Tensor], kind: gguf.GGMLQuantizationType) -> Path:
    """Write weights as ComfyUI's converter does: matrices in blocks, all else in float32 or bfloat16."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, value in state.items():
        own = kind if value.ndim == 2 and value.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(value.numpy(), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_gguf_is_dequantized_as_by_diffusers(kind: str, klein: Base, tmp_path: Path) -> None:
    state, own = original(klein), gguf.GGMLQuantizationType[kind]
    file = write_gguf(tmp_path / "model.gguf", state, own)
    read = {}
    for tensor in gguf.GGUFReader(file).tensors:
        value = torch.from_numpy(tensor.data.copy())
        is_plain = tensor.tensor_type == gguf.GGMLQuantizationType.F32
        blocks = value if is_plain else dequantize_gguf_tensor(GGUFParameter(value, quant_type=tensor.tensor_type))
        read[tensor.name] = blocks.float()
    wanted = load_base(write(tmp_path / "wanted.safetensors", read), components=klein.name)
    base = load_base(file, components=klein.name)
    for name, value in base.denoiser.state_dict().items():
        torch.testing.assert_close(value, wanted.denoiser.state_dict()[name], rtol=2e-3, atol=1e-7)  # theirs is float16
    assert load_base(file, None, components=klein.name).denoiser.dtype == torch.bfloat16
    assert meta_base(file, components=klein.name).family.name == "flux2-klein"


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_of_every_kind_have_the_values_of_diffusers(kind: str, tmp_path: Path) -> None:
    """Random blocks with scales of a usual size; a weight whose rows no block divides has its shape beside it."""
    own = gguf.GGMLQuantizationType[kind]
    generator = np.random.default_rng(5)
    size, width = gguf.GGML_QUANT_SIZES[own]
    blocks = generator.integers(0, 256, (6, 2 * width), np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q5_0": (0,)}.get(kind, (0, 2))
    for start in halves:
        for block in (0, width):
            scales = generator.uniform(0.001, 0.1, 6).astype(np.float16)
            blocks[:, block + start : block + start + 2] = scales.view(np.uint8).reshape(6, 2)
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "flux")
    for name in ("plain", "reshaped"):
        writer.add_tensor(name, blocks, raw_dtype=own)
    writer.add_array("comfy.gguf.orig_shape.reshaped", [4, 3 * size])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = open_gguf(tmp_path / "blocks.gguf")
    theirs = dequantize_gguf_tensor(GGUFParameter(torch.from_numpy(blocks.copy()), quant_type=own)).float()
    assert tensors["plain"].shape == (6, 2 * size)
    found = tensors["plain"].read()
    assert found.isfinite().all()
    torch.testing.assert_close(found, theirs, rtol=4e-3, atol=2e-3 * float(found.abs().max()))
    assert torch.equal(tensors["plain"].rows(2, 5), found[2:5])
    assert torch.equal(tensors["reshaped"].rows(1, 3), found.reshape(4, 3 * size)[1:3])


def refused(file: Path, components: str | Path | None, *, by_plan: bool = True) -> str:
    """What loading says of a file, in a single line; laying it out says the same."""
    with pytest.raises(DiffgraftError) as caught:
        load_base(file, components=components)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 700
    if by_plan:
        with pytest.raises(DiffgraftError) as caught:
            meta_base(file, components=components)
        assert str(caught.value) == said
    return said


QKV, LAST, FIRST = "double_blocks.0.img_attn.qkv.weight", "single_blocks.1.linear2", "img_in.weight"
WEIGHT, SCALE, FORMAT = f"{LAST}.weight", f"{LAST}.weight_scale", f"{LAST}.comfy_quant"
EIGHTH = {WEIGHT: lambda value: value.to(torch.float8_e4m3fn)}
Damage = Mapping[str, Tensor | Callable[[Tensor], Tensor] | None]


@pytest.mark.parametrize(
    ("damage", "answer"),
    [
        ({QKV: None}, f"it lacks 3 of the 33 weights that its sizes imply, such as {QKV}"),
        ({FIRST: None}, "lacks x_embedder.weight, which tells the size"),
        ({"single_blocks.1.linear_2.weight": torch.ones(2, 3)}, "did you mean 'single_blocks.1.linear2.weight'?"),
        ({FIRST: None, "x_in.weight": torch.ones(2, 3)}, "holds x_in.weight, one of a weight that a transformer of"),
        ({"time_in.in_layer.bias": torch.ones(32)}, "time_in.in_layer.bias does not belong to one of its sizes"),
        ({"x_embedder.weight": torch.ones(32, 16)}, "both img_in.weight and x_embedder.weight hold x_embedder.weight"),
        ({WEIGHT: lambda value: value[:, :-1]}, f"{WEIGHT} has the shape [32, 127]"),
        ({QKV: lambda value: value[:-1]}, "img_attn.qkv has 95 rows, which are not divisible by 3"),
        ({QKV: lambda value: value[:-3]}, f"{QKV} has the shape [31, 32] in the rows from 0 to 31"),
        ({QKV: torch.ones(6)}, f"{QKV} has the shape [2]"),
        ({QKV: torch.tensor(2.0)}, "img_attn.qkv has 1 rows, which are not divisible by 3"),
        ({QKV: lambda value: value.to(torch.int8)}, f"{QKV} is I8; weights are floating-point"),
        ({SCALE: torch.tensor(1.0)}, f"{WEIGHT} is F32; only weights in float8 have scales"),
        ({"other.scale_weight": torch.tensor(1.0)}, "other.weight is missing"),
        ({SCALE: torch.tensor(math.nan), **EIGHTH}, "weight_scale that is not finite"),
        ({SCALE: torch.ones(5), **EIGHTH}, "weight_scale of shape [5]; a scale is one number, or [32, 1]"),
        ({"scaled_fp8": torch.zeros(2), **EIGHTH}, f"no {LAST}.scale_weight"),
        ({FORMAT: text_tensor({"format": "float8_e4m3fn"}), **EIGHTH}, f"no {SCALE}"),
        ({FORMAT: text_tensor({"format": "nvfp4"})}, "in the format 'nvfp4'; of quantized weights only"),
        ({FORMAT: text_tensor({"format": ["x"]})}, "in the format ['x']"),
        ({FORMAT: text_tensor([])}, f"damaged {FORMAT}"),
        ({"\x1b]52;c;aGk=\x07.weight": torch.ones(3)}, "names are not text of at most 250 characters"),
        ({FORMAT: torch.ones(3)}, "is not the format of a layer"),
        ({f"single_blocks.{n}.linear1.weight": torch.ones(2) for n in range(2, 70)}, "num_single_layers=70"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(damage: Damage, answer: str, klein: Base, tmp_path: Path) -> None:
    state = original(klein)
    for name, change in damage.items():
        if change is None:
            del state[name]
        else:
            state[name] = change(state[name]) if callable(change) and not isinstance(change, Tensor) else change
    assert answer in refused(write(tmp_path / "model.safetensors", state), klein.name)


def test_a_header_of_formats_may_be_damaged(klein: Base, tmp_path: Path) -> None:
    for text in ("[", "[]", '{"layers": 3}', '{"layers": {"img_in": 3}}', "[" * 5000):
        file = write(tmp_path / "model.safetensors", original(klein), {"_quantization_metadata": text})
        assert "_quantization_metadata" in refused(file, klein.name) or "in the format 3" in refused(file, klein.name)


def test_cut_files_and_unknown_quantizations_are_refused(
    klein: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = original(klein)
    whole = write_gguf(tmp_path / "whole.gguf", state, gguf.GGMLQuantizationType.Q8_0).read_bytes()
    plain = write(tmp_path / "whole.safetensors", state).read_bytes()
    for content, end in ((whole, "gguf"), (plain, "safetensors")):
        for length in (0, 3, 40, len(content) // 50, len(content) // 2, len(content) - 40):
            file = tmp_path / f"cut.{end}"
            file.write_bytes(content[:length])
            assert f"cut.{end} is not a readable" in refused(file, klein.name)
    name = b"double_blocks.0.img_attn.qkv.weight"
    place = whole.index(name) + len(name) + 4 + 2 * 8  # behind the number of axes and both lengths
    for number, said in ((24, "not supported (Dequantization for I8"), (99, "not supported (np.uint32(99) is")):
        file = tmp_path / "kind.gguf"
        file.write_bytes(whole[:place] + number.to_bytes(4, "little") + whole[place + 4 :])
        assert said in refused(file, klein.name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "needs the package gguf: install it with `pip install gguf`" in refused(tmp_path / "whole.gguf", klein.name)


def test_components_are_those_of_the_transformer(klein: Base, tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", original(klein))
    assert "such as components=black-forest-labs/FLUX.2-klein-base-4B" in refused(file, None)
    assert "supported are: Flux2KleinPipeline" in refused(file, "tiny")
    assert "model.safetensors is a file: give a diffusers folder" in refused(file, file)
    assert "has components of its own" in refused(Path(klein.name), klein.name)
    wider = original(klein)
    wider["txt_in.weight"] = torch.ones(32, 120)
    said = refused(write(tmp_path / "wide.safetensors", wider), klein.name)
    assert "is a transformer for states of text of width 120, but those of" in said
    assert "have 96: give the components of the model" in said
    with pytest.raises(DiffgraftError, match="is not a transformer of zimage: it is one of flux2-klein"):
        load_base(file, components=klein.name, family="zimage")
    assert load_base(file, components=klein.name, family="flux2-klein").hash == klein.hash
    bare = shutil.copytree(klein.name, tmp_path / "bare", ignore=shutil.ignore_patterns("transformer"))
    assert "has attention heads of 16 channels, and no configuration tells how many" in refused(file, bare)


def test_of_components_on_the_hub_the_transformer_stays_there(
    klein: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(name: str, *, ignore_patterns: list[str], **_: list[str]) -> str:
        asked.append(ignore_patterns)
        assert name == "someone/klein"
        return klein.name

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    file = write(tmp_path / "model.safetensors", original(klein))
    base = load_base(file, components="someone/klein")
    assert (base.hash, base.components_from) == (klein.hash, "someone/klein")
    meta_base(file, components="someone/klein")
    assert len(asked) == 2
    assert all("transformer/*.safetensors" in ignored for ignored in asked)


def test_a_folder_in_float8_keeps_the_precision_of_the_rest(klein: Base, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(klein.name, tmp_path / "folder"))
    state = {name: value.clone() for name, value in klein.denoiser.state_dict().items()}
    norms = {name: value + 0.01 for name, value in state.items() if value.ndim == 1}
    numbers = {name: value.to(torch.float8_e4m3fn) for name, value in state.items() if value.ndim == 2}
    write(folder / "transformer" / "diffusion_pytorch_model.safetensors", {**numbers, **norms})
    base = load_base(folder)
    same_bits(base.denoiser.state_dict(), {**{name: value.float() for name, value in numbers.items()}, **norms})


def test_files_are_merged_converted_and_opened_like_folders(klein: Base, tmp_path: Path) -> None:
    file = merge_checkpoint(klein, {}, tmp_path / "model.safetensors")
    same_bits(load_file(file), original(klein))
    assert is_checkpoint(file)
    with open_weights(file) as weights, open_weights(klein.name) as whole:
        own = {name for name in whole if name.startswith("transformer.")}
        same_bits({name: weights[name] for name in weights}, {name: whole[name] for name in own})
        assert weights.shape("transformer.x_embedder.weight") == (32, 16)
    result = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "folder"), "--components", klein.name])
    assert result.exit_code == 0, result.output
    assert load_base(tmp_path / "folder").hash == klein.hash
    for state in (original(klein), klein.denoiser.state_dict(), original(klein, "diffusion_model.")):
        with pytest.raises(DiffgraftError, match="is a whole checkpoint, not an adapter"):
            dg.load_adapter(write(tmp_path / "again.safetensors", state))


def test_a_file_trains_draws_and_resumes_as_the_folder_does(klein: Base, pictures: Path, tmp_path: Path) -> None:
    """A transformer in scaled float8 is another base; one in its own precision is the same, and its files say so."""
    file = write(tmp_path / "model.safetensors", original(klein, "model.diffusion_model."))
    settings: dict[str, Any] = {"images": pictures, "subject": "dog", "steps": 3, "resolution": 32, "previews": False}
    settings |= {"prior": {"weight": 0}, "checkpoint_every": 2, "batch": 1, "sample_every": 0, "rank": 2}
    named: dict[str, Any] = {"base": str(file), "components": klein.name}
    assert "flux2-klein" in str(dg.plan(SUBJECT, **named, **settings))
    whole = dg.train(SUBJECT, **named, **settings, output=tmp_path / "whole")
    with interrupted_after(2):
        dg.train(SUBJECT, **named, **settings, output=tmp_path / "cut")
    again = dg.train(resume=tmp_path / "cut")
    assert again.adapter_file.read_bytes() == whole.adapter_file.read_bytes()
    folder = dg.train(SUBJECT, base=klein, **settings, output=tmp_path / "folder")
    ours, theirs = (dg.load_adapter(run.adapter_file) for run in (whole, folder))
    assert ours.metadata["base"] == {**theirs.metadata["base"], "name": "model.safetensors"}
    assert ours.metadata["base"]["hash"] == klein.hash
    ours.save(tmp_path / "ours.safetensors", format="comfyui")
    theirs.save(tmp_path / "theirs.safetensors", format="comfyui")
    same_bits(load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors"))
    drawn: dict[str, Any] = {"size": (48, 32), "steps": 2}
    (one,) = dg.generate("a sks dog", whole.adapter_file, **named, **drawn)
    (other,) = dg.generate("a sks dog", folder.adapter_file, base=klein, **drawn)
    assert one.tobytes() == other.tobytes()
    save_drawing(one, tmp_path / "one.png")
    assert regenerate(tmp_path / "one.png", Sources(adapters=[whole.adapter_file])).has_same_pixels
