"""Files as other tools write them are read to do the same, and what we write does the same in those tools."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Spec
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.registry import get_method, read_delta
from diffgraft.bases import load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from tests.adapters.test_families import random_lora, said
from tests.adapters.toys import shaken

OLD = {
    "newer": {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."},
    "processor": {
        f".{ours}.lora_{side}.": f".processor.{theirs}_lora.{leaf}."
        for ours, theirs in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out"))
        for side, leaf in (("A", "down"), ("B", "up"))
    },
}
OLD_TEXT = {
    "newer": {".lora_A.": ".lora_linear_layer.down.", ".lora_B.": ".lora_linear_layer.up."},
    "processor": {
        f".{ours}.lora_{side}.": f".{theirs}_lora.{leaf}."
        for ours, theirs in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out"))
        for side, leaf in (("A", "down"), ("B", "up"))
    },
}


@pytest.mark.parametrize("form", sorted(OLD))
def test_the_older_names_of_diffusers(form: str, folders: Path, tmp_path: Path) -> None:
    folder = folders / "sd1"
    base = load_base(folder)
    adapter = random_lora(base, "attention")
    plain = {path: (low_rank(d.leaves["lora_down"], d.leaves["lora_up"]),) for path, (d,) in adapter.deltas.items()}
    new = load_file(Adapter(plain, {}).save(tmp_path / "new.safetensors", "diffusers"))
    old: dict[str, Tensor] = {}
    for key, value in new.items():
        names = OLD[form] if key.startswith("unet.") else OLD_TEXT[form]
        renamed = key
        for ours, theirs in names.items():
            renamed = renamed.replace(ours, theirs)
        old[renamed] = value
    assert not set(old) & set(new)
    save_file(old, tmp_path / "old.safetensors")
    found = load_adapter(tmp_path / "old.safetensors")
    assert set(found.modules) == set(plain)
    for path, (delta,) in plain.items():
        assert all(torch.equal(leaf, found.deltas[path][0].leaves[name]) for name, leaf in delta.leaves.items())
    with graft(base, {found: 0.6}):
        wanted = said(base)
    other = load_base(folder)
    pipe = other.pipeline()
    pipe.load_lora_weights(tmp_path, weight_name="old.safetensors", adapter_name="a")
    pipe.set_adapters(["a"], [0.6])
    torch.testing.assert_close(said(other), wanted, rtol=1e-3, atol=1e-5)
    # the first files: without the level of the UNet
    only_unet = {key.removeprefix("unet."): value for key, value in old.items() if key.startswith("unet.")}
    save_file(only_unet, tmp_path / "first.safetensors")
    first = load_adapter(tmp_path / "first.safetensors")
    assert set(first.modules) == {path for path in plain if path.startswith("unet.")}
    torn = {
        key: value
        for key, value in old.items()
        if key != next(iter(only_unet)) and key != "unet." + next(iter(only_unet))
    }
    save_file(torn, tmp_path / "torn.safetensors")
    with pytest.raises(DiffgraftError, match=r"has only one of the two factors: lora_[AB] is missing"):
        load_adapter(tmp_path / "torn.safetensors")
    save_file({**old, "unet.conv_in.more": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(DiffgraftError, match=r"unknown key unet\.conv_in\.more: expected"):
        load_adapter(tmp_path / "more.safetensors")


def by_lycoris(module: type[Any], outputs: bool, layer: nn.Module, **more: Any) -> Any:
    # a scale of 1: what LyCORIS merges of LoHa and LoKr has the scale twice, unlike what it trains
    made = module("x", layer, 1.0, 3, 3.0, weight_decompose=True, wd_on_out=outputs, **more)
    shaken(made, "")
    with torch.no_grad():
        made.dora_scale.abs_().add_(0.5)
    return made


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("module", [LoConModule, LohaModule, LokrModule])
def test_dora_of_lycoris_at_any_strength(module: type[Any], outputs: bool, tmp_path: Path) -> None:
    for layer in (nn.Linear(10, 14), nn.Conv2d(6, 10, 3)):
        torch.manual_seed(1)
        made = by_lycoris(module, outputs, copy.deepcopy(layer))
        state = {f"lora_unet_mid_block_x.{name}": value.contiguous() for name, value in made.state_dict().items()}
        state.pop("lora_unet_mid_block_x.scalar", None)
        save_file({key: value for key, value in state.items() if "org_" not in key}, tmp_path / "a.safetensors")
        adapter = load_adapter(tmp_path / "a.safetensors")
        ((delta,),) = adapter.deltas.values()
        assert isinstance(delta, DoraDelta)
        assert delta.has_input_norms is not outputs
        weight = made.org_module[0].weight.detach()
        assert delta.fits(tuple(weight.shape))
        again = load_adapter(adapter.save(tmp_path / "b.safetensors", "lycoris"))
        native = load_adapter(adapter.save(tmp_path / "c.safetensors", "diffgraft"))
        for strength in (1.0, 0.4, -0.5):
            with torch.no_grad():
                wanted, _ = made.get_merged_weight(strength, tuple(weight.shape))
            for found in (adapter, again, native):
                ((one,),) = found.deltas.values()
                torch.testing.assert_close(one.apply(weight, None, strength)[0], wanted, rtol=1e-4, atol=1e-5)


def test_headers_of_kohya(tmp_path: Path) -> None:
    deltas = {
        "unet.mid_block.attentions.0.proj_in": (low_rank(torch.ones(2, 5), torch.ones(7, 2), 1.0),),
    }
    for base, version, architecture in (
        ({"family": "sd1"}, "sd_v1", "stable-diffusion-v1/lora"),
        ({"family": "sd2", "prediction_type": "v_prediction"}, "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ({"family": "sdxl"}, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ):
        metadata = {"method": "lora", "rank": 2, "alpha": 1.0, "seed": 7, "trigger": "sks", "base": base}
        file = Adapter(deltas, metadata).save(tmp_path / "a.safetensors", "kohya")
        with safe_open(file, framework="pt") as held:
            header = held.metadata()
        assert header["ss_base_model_version"] == version
        assert header["modelspec.architecture"] == architecture
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "1.0")
        assert header["ss_v2"] == str(base["family"] == "sd2")
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        assert header["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
        # a file of kohya's own has all of that, and not our entry
        del header["diffgraft"]
        header["ss_tag_frequency"] = '{"dog": 3}'
        save_file(load_file(file), tmp_path / "theirs.safetensors", header)
        theirs = load_adapter(tmp_path / "theirs.safetensors")
        assert theirs.metadata["base"]["family"] == base["family"]
        assert (theirs.metadata["rank"], theirs.metadata["alpha"], theirs.metadata["seed"]) == (2, 1, 7)
        assert theirs.metadata["trigger"] == "sks"
        again = theirs.save(tmp_path / "again.safetensors", "kohya")
        with safe_open(again, framework="pt") as held:
            assert held.metadata()["ss_tag_frequency"] == '{"dog": 3}'
            assert held.metadata()["sshs_model_hash"] == header["sshs_model_hash"]


LORA = {"lora_down": torch.ones(2, 10), "lora_up": torch.ones(14, 2)}
KERNEL = {"lora_down": torch.ones(2, 10, 1, 1), "lora_up": torch.ones(14, 2, 1, 1), "lora_mid": torch.ones(2, 2, 3, 3)}
LOHA = {f"hada_w{n}_{side}": torch.ones(14, 2) if side == "a" else torch.ones(2, 10) for n in (1, 2) for side in "ab"}


@pytest.mark.parametrize(
    ("kind", "leaves", "module", "arguments"),
    [
        ("lora", LORA, "networks.lora", {}),
        ("lora", {**LORA, "dora_scale": torch.ones(1, 10)}, "lycoris.kohya", {"algo": "locon", "dora_wd": "True"}),
        ("lora", KERNEL, "lycoris.kohya", {"algo": "locon", "use_tucker": "True"}),
        ("loha", LOHA, "lycoris.kohya", {"algo": "loha"}),
    ],
)
def test_the_header_of_kohya_names_a_module_that_reads_all_of_the_file(
    kind: str, leaves: dict[str, Tensor], module: str, arguments: dict[str, str], tmp_path: Path
) -> None:
    """The one of sd-scripts drops norms of DoRA and cores of Tucker without a word; a former header may name it."""
    deltas = {"unet.mid_block.resnets.0.conv1": (read_delta(kind, leaves, 1.0),)}
    former = {"ss_network_module": "networks.lora", "ss_network_args": '{"conv_dim": "4"}', "ss_seed": "9"}
    for metadata in ({}, {"foreign": former}):
        file = Adapter(deltas, metadata).save(tmp_path / "a.safetensors", "kohya")
        with safe_open(file, framework="pt") as held:
            header = held.metadata()
        assert header["ss_network_module"] == module
        if module != "networks.lora" or not metadata:
            assert json.loads(header["ss_network_args"]) == arguments
        assert header.get("ss_seed") == ("9" if metadata else None)


@pytest.mark.parametrize("dialect", ["kohya", "lycoris"])
def test_the_alpha_of_a_lokr_of_whole_factors_is_its_rank_in_files(dialect: str, tmp_path: Path) -> None:
    """Other tools divide it by the rank, though there is none; LyCORIS writes the rank."""
    one, two = torch.arange(10.0).view(2, 5), torch.arange(14.0).view(7, 2)
    delta = read_delta("lokr", {"lokr_w1": one, "lokr_w2": two}, 1.0)
    path = "unet.mid_block.attentions.0.proj_in"
    adapter = Adapter({path: (delta,)}, {"rank": 8, "alpha": 1.0, "base": {"family": "sd1"}})
    file = adapter.save(tmp_path / "a.safetensors", dialect)
    assert float(load_file(file)["lora_unet_mid_block_attentions_0_proj_in.alpha"]) == 8
    (again,) = load_adapter(file).deltas[path]
    assert torch.equal(again.apply(torch.zeros(14, 10), None, 1.0)[0], torch.kron(one, two))


@pytest.mark.parametrize(
    ("name", "down", "up", "norms"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in", "lora_down.weight", "lora_up.weight", "magnitude"),
        ("diffusion_model.middle_block.1.proj_in", "lora_A.weight", "lora_B.weight", "magnitude"),
        ("diffusion_model.middle_block.1.proj_in", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
        ("diffusion_model.middle_block.1.proj_in", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"),
    ],
)
def test_leaves_of_peft_and_ai_toolkit_under_names_of_other_tools(
    name: str, down: str, up: str, norms: str, tmp_path: Path
) -> None:
    magnitude = torch.arange(1.0, 15.0)
    tensors = {f"{name}.{down}": LORA["lora_down"], f"{name}.{up}": LORA["lora_up"], f"{name}.{norms}": magnitude}
    save_file(tensors, tmp_path / "x.safetensors")
    (delta,) = load_adapter(tmp_path / "x.safetensors").deltas["unet.mid_block.attentions.0.proj_in"]
    found, _ = delta.apply(torch.zeros(14, 10), None, 1.0)
    torch.testing.assert_close(found.norm(dim=1), magnitude)


def test_what_webui_would_misread_is_refused(tmp_path: Path) -> None:
    lora = low_rank(torch.ones(2, 10), torch.ones(14, 2))
    path = "unet.mid_block.attentions.0.proj_in"
    torn = {f"text_encoder_2.encoder.layers.0.self_attn.{name}_proj": (lora,) for name in "qk"}
    for deltas, answer in (
        ({path: (DoraDelta(lora, torch.ones(14)),)}, "a DoRA with norms of the outputs"),
        (torn, "it needs all four"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            Adapter(deltas).save(tmp_path / "x.safetensors", "webui")
    assert not list(tmp_path.iterdir())
    by_inputs = Adapter({path: (DoraDelta(lora, torch.ones(1, 10)),)})
    assert load_adapter(by_inputs.save(tmp_path / "x.safetensors", "webui")).modules == [path]
    word = Adapter({}, {}, tokens={"<zorp>": {"text_encoder": torch.ones(2, 8)}})
    assert list(load_file(word.save(tmp_path / "zorp.safetensors", "webui"))) == ["emb_params"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"structure": "1,2,2,1", "layer_norm": "true", "dropout": "0,0.2,0.3,0"},
        {"layer_norm": "true", "activation": "relu", "activate_output": "false"},
    ],
)
def test_hypernetworks_for_webui(options: dict[str, str], folders: Path, tmp_path: Path) -> None:
    xl = load_base(folders / "sdxl")
    method = get_method("hypernetwork")
    read = method.read_options(options)
    paths = {"unet": choose_layers("unet", xl.unet, method.layers_under(read))}
    live = method.attach(xl, Spec(paths, 1, 1.0, 0, read))
    shaken(live, "weight")
    adapter = live.adapter({"method": "hypernetwork", "trigger": "sks"})
    live.detach()
    if "activation" in options:
        with pytest.raises(DiffgraftError, match="no activation after its last layer, where ComfyUI adds one"):
            adapter.save(tmp_path / "x.pt", "webui")
        return
    with pytest.raises(DiffgraftError, match=r"name it x\.pt"):
        adapter.save(tmp_path / "x.safetensors", "webui")
    file = adapter.save(tmp_path / "x.pt", "webui")
    held = torch.load(file, weights_only=True)
    widths = sorted(key for key in held if isinstance(key, int))
    assert all(len(held[width]) == 2 for width in widths)
    assert held["layer_structure"] == [int(n) for n in options.get("structure", "1,2,1").split(",")]
    with graft(xl, {adapter: 0.7}):
        wanted = said(xl)
    with graft(xl, {file: 0.7}):
        torch.testing.assert_close(said(xl), wanted)


def test_custom_diffusion_as_diffusers_does_it(folders: Path, tmp_path: Path) -> None:
    """The weights in the places of diffusers' processors, and read from a file of their names."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    folder = folders / "sd1"
    base, other = load_base(folder), load_base(folder)
    bare = said(base)
    processors: dict[str, Any] = dict(other.unet.attn_processors)
    held: dict[str, Any] = {}
    torch.manual_seed(2)
    for name in processors:
        attention = other.unet.get_submodule(name.removesuffix(".processor"))
        if "attn1" in name:
            held[name] = {}
            continue
        made = CustomDiffusionAttnProcessor(
            train_kv=True, train_q_out=True, hidden_size=attention.to_q.out_features, cross_attention_dim=20
        )
        shaken(made, "")
        processors[name] = made
        held |= {f"{name}.{key}": value for key, value in made.state_dict().items()}
    other.unet.set_attn_processor(processors)
    torch.save(held, tmp_path / "pytorch_custom_diffusion_weights.bin")
    found = load_adapter(tmp_path / "pytorch_custom_diffusion_weights.bin")
    assert found.method == "custom"
    wanted = said(other)
    assert (wanted - bare).abs().max() > 1e-3
    with graft(base, {found: 1.0}):
        torch.testing.assert_close(said(base), wanted, rtol=1e-3, atol=1e-5)
    with graft(base, {found: 0.0}):
        assert torch.equal(said(base), bare)
    again = load_adapter(found.save(tmp_path / "a.safetensors"))
    with graft(base, {again: 1.0}):
        torch.testing.assert_close(said(base), wanted, rtol=1e-3, atol=1e-5)


def test_alphas_are_those_of_each_module(tmp_path: Path) -> None:
    """Diffusers takes the commonest for all of a text encoder, and that of others where one has none."""
    start = "lora_te_text_model_encoder_layers_"
    tensors: dict[str, Tensor] = {}
    for layer, alpha in ((0, 1.0), (1, 4.0), (2, None)):
        name = f"{start}{layer}_self_attn_q_proj"
        tensors |= {f"{name}.lora_down.weight": torch.ones(2, 5), f"{name}.lora_up.weight": torch.ones(7, 2)}
        tensors |= {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = load_adapter(tmp_path / "a.safetensors")
    scales = [delta.scale for (delta,) in found.deltas.values()]  # type: ignore[attr-defined]
    assert scales == [0.5, 2.0, 1.0]
    assert found.modules[0] == "text_encoder.encoder.layers.0.self_attn.q_proj"


def test_two_kinds_of_names_in_one_file(tmp_path: Path) -> None:
    """Diffusers goes by the first key, and loses the others; here every key is used, or named."""
    start = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    new = {f"{start}.to_q.lora_A.weight": torch.ones(2, 5), f"{start}.to_q.lora_B.weight": torch.ones(7, 2)}
    old = {f"{start}.to_k.lora.down.weight": torch.ones(2, 5), f"{start}.to_k.lora.up.weight": torch.ones(7, 2)}
    save_file({**new, **old}, tmp_path / "a.safetensors")
    assert set(load_adapter(tmp_path / "a.safetensors").modules) == {f"{start}.to_q", f"{start}.to_k"}
    save_file({key.removeprefix("unet."): value for key, value in new.items()}, tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors").modules == [f"{start}.to_q"]
    twice = {key.replace("to_k", "to_q"): value for key, value in old.items()}
    save_file({**new, **twice}, tmp_path / "a.safetensors")
    with pytest.raises(
        DiffgraftError, match=r"repeats the leaf lora_\w+ of unet\.mid_block.*to_q, which an earlier key has"
    ):
        load_adapter(tmp_path / "a.safetensors")


def test_kohya_names_as_diffusers_writes_them(folders: Path, tmp_path: Path) -> None:
    """It calls the only text encoder of Stable Diffusion 1 the first of two."""
    from diffusers.utils import convert_state_dict_to_kohya

    base = load_base(folders / "sd1")
    adapter = random_lora(base, "attention")
    plain = {path: (low_rank(d.leaves["lora_down"], d.leaves["lora_up"]),) for path, (d,) in adapter.deltas.items()}
    ours = load_file(Adapter(plain, {}).save(tmp_path / "a.safetensors", "diffusers"))
    theirs = convert_state_dict_to_kohya(ours)
    assert any(key.startswith("lora_te1_") for key in theirs)
    save_file({key: value.contiguous() for key, value in theirs.items()}, tmp_path / "b.safetensors")
    found = load_adapter(tmp_path / "b.safetensors")
    assert set(found.modules) == set(plain)
    assert all(
        torch.equal(found.deltas[path][0].leaves["lora_up"], d.leaves["lora_up"]) for path, (d,) in plain.items()
    )


@pytest.mark.parametrize(
    "said", [{"ss_base_model_version": "sd_v2_v"}, {"ss_v2": "True", "ss_v_parameterization": "True"}]
)
def test_a_base_that_predicts_v_is_one_in_every_entry(said: dict[str, str], tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 1024), f"{name}.lora_up.weight": torch.ones(1280, 2)}
    save_file(tensors, tmp_path / "a.safetensors", said)
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert adapter.metadata["base"]["prediction_type"] == "v_prediction"
    with safe_open(adapter.save(tmp_path / "b.safetensors", "kohya"), "pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert header["modelspec.resolution"] == "768x768"
    assert header["modelspec.prediction_type"] == "v"
