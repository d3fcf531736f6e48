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
from diffgraft.adapters.lora import low_rank
from diffgraft.adapters.method import Spec, choose_layers, get_method
from diffgraft.bases import Base, load_base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from tests.adapters.test_families import random_lora, said
from tests.conftest import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("bases") / "sdxl", "sdxl")


@pytest.fixture
def xl(folder: Path) -> Base:
    return load_base(folder)


def shaken(module: nn.Module, only: str) -> None:
    """Fill the parameters whose name holds `only`."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if only in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator) + (1.0 if "magnitude" in name else 0.0))


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
def test_the_older_names_of_diffusers(form: str, tmp_path: Path) -> None:
    folder = small(tmp_path / "base", "sd1")
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
    with pytest.raises(DiffgraftError, match="half of the file is missing"):
        load_adapter(tmp_path / "torn.safetensors")
    save_file({**old, "unet.conv_in.more": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(DiffgraftError, match=r"its key unet\.conv_in\.more is no"):
        load_adapter(tmp_path / "more.safetensors")


def configs(part: str, module: nn.Module) -> dict[str, Any]:
    """Configurations of peft for layers of a part, mixed in rank and alpha."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    attention, everything = (choose_layers(part, module, layers) for layers in ("attention", "all"))
    patterns: dict[str, Any] = {
        "rank_pattern": {attention[0]: 5, r".*to_v": 2} if part == "unet" else {attention[0]: 5},
        "alpha_pattern": {attention[0]: 7.5, attention[1]: 1.0},
    }
    return {
        "lora": LoraConfig(r=3, lora_alpha=2, target_modules=attention, init_lora_weights=False, **patterns),
        "rslora": LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=everything, init_lora_weights=False),
        "dora": LoraConfig(r=3, lora_alpha=2, use_dora=True, target_modules=everything, init_lora_weights=False),
        "loha": LoHaConfig(r=3, alpha=2, target_modules=everything, init_weights=False, **patterns),
        "loha tucker": LoHaConfig(
            r=3, alpha=2, target_modules=everything, init_weights=False, use_effective_conv2d=True
        ),
        "lokr": LoKrConfig(r=3, alpha=2, target_modules=everything, init_weights=False, decompose_both=True),
        "lokr whole": LoKrConfig(r=64, alpha=2, target_modules=everything, init_weights=False),
        "lokr tucker": LoKrConfig(
            r=2, alpha=3, target_modules=everything, init_weights=False, use_effective_conv2d=True, decompose_factor=4
        ),
    }


peft_asks = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@peft_asks
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "loha tucker", "lokr", "lokr whole", "lokr tucker"])
def test_folders_of_peft_are_read(kind: str, xl: Base, folder: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    other = load_base(folder)
    bare = said(xl)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        torch.manual_seed(3)
        model = get_peft_model(getattr(other, part), configs(part, getattr(other, part))[kind])
        shaken(model, "magnitude")
        model.save_pretrained(tmp_path / part)
    wanted = said(other)
    assert (wanted - bare).abs().max() > 1e-3
    found = load_adapter(tmp_path)
    assert found.method == kind.split(" ")[0].replace("rslora", "lora").replace("dora", "lora")
    with graft(xl, {found: 1.0}):
        torch.testing.assert_close(said(xl), wanted, rtol=1e-3, atol=1e-4)
    alone = load_adapter(tmp_path / "unet")
    assert set(alone.modules) == {path for path in found.modules if path.startswith("unet.")}


@peft_asks
@pytest.mark.parametrize("method", ["lora", "dora", "locon", "loha", "loha tucker"])
def test_peft_reads_the_folders_we_write(method: str, xl: Base, folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    name, _, more = method.partition(" ")
    chosen = get_method("lora" if name == "dora" else name)
    options = chosen.read_options({"dora": True} if name == "dora" else {"tucker": True} if more else {})
    parts = ("unet", "text_encoder", "text_encoder_2")
    paths = {part: choose_layers(part, getattr(xl, part), chosen.layers_under(options)) for part in parts}
    live = chosen.attach(xl, Spec(paths, 3, 2.0, 0, options))
    shaken(live, "")
    adapter = live.adapter({"method": chosen.name})
    live.detach()
    written = adapter.save(tmp_path / "peft", "peft")
    again = load_adapter(written)
    assert again.metadata == adapter.metadata
    with graft(xl, {adapter: 1.0}):
        wanted = said(xl)
    with graft(xl, {again: 1.0}):
        assert torch.equal(said(xl), wanted)
    other = load_base(folder)
    bare = said(other)
    for part in parts:
        PeftModel.from_pretrained(getattr(other, part), written / part)
    assert (said(other) - bare).abs().max() > 1e-3
    torch.testing.assert_close(said(other), wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(DiffgraftError, match="must be the name of a new one"):
        adapter.save(written, "peft")


def test_what_peft_has_no_folder_for_is_refused(tmp_path: Path) -> None:
    lora = low_rank(torch.ones(2, 5), torch.ones(7, 2))
    word = Adapter({"unet.a": (lora,)}, {}, tokens={"<zorp>": {"text_encoder": torch.ones(1, 8)}})
    for adapter, answer in (
        (word, "it holds words"),
        (Adapter({"unet.a": (lora, lora)}), "holds 2 deltas"),
        (Adapter({"vae.a": (lora,)}), "is in none of"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            adapter.save(tmp_path / "x", "peft")
    plain = Adapter({"unet.a": (lora,)}).save(tmp_path / "good", "peft")
    config = json.loads((plain / "adapter_config.json").read_text())
    for change, answer in (
        ({"peft_type": "OFT"}, "it is peft's OFT; read are LORA, LOHA, LOKR"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "only paths are read"),
        ({"lora_alpha": "x"}, "gives 'x' as an alpha"),
    ):
        (plain / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(DiffgraftError, match=answer):
            load_adapter(plain)
    (plain / "adapter_config.json").write_text("{")
    with pytest.raises(DiffgraftError, match="is no JSON"):
        load_adapter(plain)
    with pytest.raises(DiffgraftError, match="give the folder"):
        load_adapter(plain / "adapter_model.safetensors")


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
        assert delta.of_inputs is not outputs
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


def test_what_webui_would_misread_is_refused(tmp_path: Path) -> None:
    lora = low_rank(torch.ones(2, 10), torch.ones(14, 2))
    path = "unet.mid_block.attentions.0.proj_in"
    torn = {f"text_encoder_2.encoder.layers.0.self_attn.{name}_proj": (lora,) for name in "qk"}
    for deltas, answer in (
        ({path: (DoraDelta(lora, torch.ones(14)),)}, "a DoRA by outputs"),
        (torn, "webui needs all four"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            Adapter(deltas).save(tmp_path / "x.safetensors", "webui")
    assert not list(tmp_path.iterdir())
    by_inputs = Adapter({path: (DoraDelta(lora, torch.ones(1, 10)),)})
    assert load_adapter(by_inputs.save(tmp_path / "x.safetensors", "webui")).modules == [path]
    word = Adapter({}, {}, tokens={"<zorp>": {"text_encoder": torch.ones(2, 8)}})
    assert list(load_file(word.save(tmp_path / "zorp.safetensors", "webui"))) == ["<zorp>"]


@pytest.mark.parametrize("options", [{}, {"structure": "1,2,2,1", "layer_norm": "true", "dropout": "0,0.2,0.3,0"}])
def test_hypernetworks_for_webui(options: dict[str, str], xl: Base, tmp_path: Path) -> None:
    method = get_method("hypernetwork")
    read = method.read_options(options)
    paths = {"unet": choose_layers("unet", xl.unet, method.layers_under(read))}
    live = method.attach(xl, Spec(paths, 1, 1.0, 0, read))
    shaken(live, "weight")
    adapter = live.adapter({"method": "hypernetwork", "trigger": "sks"})
    live.detach()
    with pytest.raises(DiffgraftError, match=r"give x\.pt as a name"):
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


def test_custom_diffusion_as_diffusers_does_it(tmp_path: Path) -> None:
    """The weights in the places of diffusers' processors, and read from a file of their names."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    folder = small(tmp_path / "base", "sd1")
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
    assert found.method == "custom-diffusion"
    wanted = said(other)
    assert (wanted - bare).abs().max() > 1e-3
    with graft(base, {found: 1.0}):
        torch.testing.assert_close(said(base), wanted, rtol=1e-3, atol=1e-5)
    with graft(base, {found: 0.0}):
        assert torch.equal(said(base), bare)
    again = load_adapter(found.save(tmp_path / "a.safetensors"))
    with graft(base, {again: 1.0}):
        torch.testing.assert_close(said(base), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("locon", {"tucker": True}),
        ("loha", {}),
        ("loha", {"tucker": True}),
        ("lokr", {"split_both": True}),
        ("lokr", {"full_matrix": True}),
        ("full", {}),
    ],
)
def test_lycoris_reads_what_we_write(
    method: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights

    folder = small(tmp_path / "base", "sd1")
    base, other = load_base(folder), load_base(folder)
    chosen = get_method(method)
    read = chosen.read_options(options)
    parts = {"unet": base.unet, "text_encoder": base.text_encoder}
    paths = {part: choose_layers(part, module, chosen.layers_under(read)) for part, module in parts.items()}
    live = chosen.attach(base, Spec(paths, 3, 2.0, 0, read))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for value in live.trainable().values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    adapter = live.adapter({"method": method, "base": {"family": "sd1"}})
    live.detach()
    if method == "full":  # of which LyCORIS' reader of files takes linear layers and convolutions
        layers = {path for part, module in parts.items() for path in _layers(part, module)}
        adapter = Adapter({path: own for path, own in adapter.deltas.items() if path in layers}, adapter.metadata)
    file = adapter.save(tmp_path / "a.safetensors", "lycoris")
    with graft(base, {adapter: 1.0}):
        wanted = said(base)
    bare = said(other)
    # it goes by the live module's names, and files have the level that transformers has dropped since
    leveled = nn.Module()
    leveled.text_model = other.text_encoder
    # it first makes a network of its own choice, to throw it away: that shall be empty
    for kind in ("UNET_TARGET_REPLACE_MODULE", "UNET_TARGET_REPLACE_NAME", "TEXT_ENCODER_TARGET_REPLACE_MODULE"):
        monkeypatch.setattr(LycorisNetworkKohya, kind, [])
    network, _ = create_network_from_weights(1.0, str(file), None, leveled, other.unet)
    assert len(network.unet_loras) + len(network.text_encoder_loras) == len(adapter.modules)
    network.apply_to(leveled, other.unet, True, True)
    network.eval()
    assert (wanted - bare).abs().max() > 1e-3
    torch.testing.assert_close(said(other), wanted, rtol=1e-3, atol=1e-4)


def _layers(part: str, root: nn.Module) -> list[str]:
    return [f"{part}.{path}" for path, module in root.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


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


def test_two_kinds_of_names_in_one_file_are_refused(tmp_path: Path) -> None:
    """Diffusers goes by the first key, and loses the others."""
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    new = {f"{path}.lora_A.weight": torch.ones(2, 5), f"{path}.lora_B.weight": torch.ones(7, 2)}
    old = {f"{path}.lora.down.weight": torch.ones(2, 5), f"{path}.lora.up.weight": torch.ones(7, 2)}
    save_file({**new, **old}, tmp_path / "a.safetensors")
    with pytest.raises(DiffgraftError, match=r"its key unet\.mid_block.*\.lora\.(down|up)\.weight is no"):
        load_adapter(tmp_path / "a.safetensors")


def test_kohya_names_as_diffusers_writes_them(tmp_path: Path) -> None:
    """It calls the only text encoder of Stable Diffusion 1 the first of two."""
    from diffusers.utils import convert_state_dict_to_kohya

    base = load_base(small(tmp_path / "base", "sd1"))
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


def test_rslora_of_diffusers(tmp_path: Path) -> None:
    """Diffusers' header keeps peft's configuration: alpha / √rank there."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    folder = small(tmp_path / "base", "sd1")
    base, other = load_base(folder), load_base(folder)
    layers = choose_layers("unet", other.unet, "attention")
    patterns = {"rank_pattern": {layers[0]: 5}, "alpha_pattern": {layers[1]: 9.0}}
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=layers, init_lora_weights=False, **patterns)
    other.unet.add_adapter(config)
    wanted = said(other)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(other.unet)),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    (file,) = tmp_path.glob("*.safetensors")
    assert (wanted - said(base)).abs().max() > 1e-3
    with graft(base, {file: 1.0}):
        torch.testing.assert_close(said(base), wanted, rtol=1e-3, atol=1e-5)
