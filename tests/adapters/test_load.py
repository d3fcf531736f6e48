"""What is attached goes on from a file: at once it does what grafting the file does, whichever tool wrote it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Attached, Spec, strip_text_model
from diffgraft.adapters.methods.hypernetwork import HypernetworkOptions
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.registry import get_method, read_delta, written_dialects
from diffgraft.bases import Base
from diffgraft.bases.layers import choose_layers, parts_of
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from tests.adapters.test_families import said
from tests.adapters.test_lycoris import _made_by_lycoris, _targets, as_trained_by_kohya  # noqa: F401  (a fixture)
from tests.adapters.test_peft import configs, peft_asks
from tests.adapters.toys import VARIANTS, Net, attach, input_of, name_of, shake, shaken
from tests.conftest import fresh

SIZES = ("ranks", "alphas", "conv_rank", "conv_alpha", "rslora")
"""What a file brings along itself"""


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=[name_of(variant) for variant in VARIANTS])
def test_it_does_what_the_file_does_and_trains_on(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """In every dialect of single files, onto an adapter of another rank, alpha and seed."""
    net = Net().requires_grad_(False)
    live = attach(net, method, options)
    shake(live)
    adapter = live.adapter({"method": method})
    live.detach()
    x = input_of(net)
    with graft(net, {adapter: 1.0}), torch.no_grad():
        wanted = net(x)
    assert (wanted - net(x)).abs().max() > 0.05
    held = 0
    for dialect in ("auto", *written_dialects()):
        try:
            file = adapter.save(tmp_path / f"{dialect}.safetensors", dialect)
        except DiffgraftError:
            continue
        held += 1
        chosen = get_method(method)
        left = chosen.read_options({key: value for key, value in options.items() if key not in SIZES})
        spec = Spec({"unet": [path.removeprefix("unet.") for path in adapter.modules]}, 2, 1.25, 99, left)
        live = chosen.attach(SimpleNamespace(unet=net), spec)
        before = live.paths()
        assert live.load(load_adapter(file)) == set(adapter.modules)
        assert set(live.paths().values()) == set(before.values()) == set(adapter.modules)
        with torch.no_grad():
            torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=2e-5)
        for path, (delta,) in live.adapter({}).deltas.items():
            weight = net.get_submodule(path.removeprefix("unet.")).get_parameter("weight")
            (theirs,) = adapter.deltas[path]
            # of `full` a sum is kept, and the difference made again; T-LoRA divides its factors into P, λ and Q anew;
            # diffusers' layout has the scale in the factors
            if method not in ("full", "tlora") and theirs.alpha == load_adapter(file).deltas[path][0].alpha:
                assert all(torch.equal(leaf, delta.leaves[name]) for name, leaf in theirs.leaves.items())
            now, then = (one.apply(weight.detach(), None, 1.0)[0] for one in (delta, theirs))
            torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-6)
        net(x).square().mean().backward()
        assert all(value.grad is not None and value.grad.abs().max() > 0 for value in live.trainable().values())
        live.detach()
    assert held >= 3


def on_modules_of(base: Base, adapter: Adapter, method: str, **options: Any) -> Attached:
    """A method on the very modules that an adapter has, at other ranks."""
    paths: dict[str, list[str]] = {}
    for part, module in parts_of(base).items():
        paths[part] = [
            path for path, _ in module.named_modules() if strip_text_model(f"{part}.{path}") in adapter.deltas
        ]
    chosen = get_method(method)
    return chosen.attach(base, Spec(paths, 2, 0.75, 4, chosen.read_options(options), "<zorp>"))


LYCORIS = {
    "lora": ("locon", {}),
    "lora, rs": ("locon", {}),
    "lora, scalar": ("locon", {}),
    "lora, tucker": ("locon", {}),
    "lora, dora": ("locon", {"dora": True}),
    "loha": ("loha", {}),
    "loha, tucker": ("loha", {}),
    "lokr": ("lokr", {}),
    "lokr, both": ("lokr", {}),
    "lokr, whole": ("lokr", {}),
    "lokr, tucker": ("lokr", {}),
    "full": ("full", {}),
    "glora": ("full", {}),
    "lora, norms": ("full", {}),
}
"""What LyCORIS makes → the method that goes on with it, and its options"""


@pytest.mark.parametrize(
    ("family", "name"), [("sd1", "lora"), ("sd1", "lokr"), ("sd1", "full"), *(("sdxl", name) for name in LYCORIS)]
)
def test_files_of_lycoris_go_on(
    family: str, name: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = fresh(folders / family), fresh(folders / family)
    text, unet = as_trained_by_kohya(other)
    network = _made_by_lycoris(name, text, unet, monkeypatch)
    network.apply_to(text, unet, True, True)
    network.eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    _goes_on(base, load_adapter(tmp_path / "a.safetensors"), said(other), *LYCORIS[name])


def _goes_on(base: Base, found: Adapter, wanted: Tensor, method: str, options: dict[str, Any]) -> None:
    """What is attached does what the tool does that wrote the file, and so does what it leaves."""
    bare = said(base)
    assert (wanted - bare).abs().max() > 1e-3
    live = on_modules_of(base, found, method, **options)
    assert live.load(found) == set(found.modules)
    torch.testing.assert_close(said(base), wanted, rtol=1e-3, atol=1e-4)
    again = live.adapter({})
    live.detach()
    assert torch.equal(said(base), bare)
    with graft(base, {again: 1.0}):
        torch.testing.assert_close(said(base), wanted, rtol=1e-3, atol=1e-4)


@peft_asks
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "loha tucker", "lokr", "lokr whole", "lokr tucker"])
def test_folders_of_peft_go_on(kind: str, family: str, folders: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    base, other = fresh(folders / family), fresh(folders / family)
    for part, module in parts_of(other).items():
        torch.manual_seed(3)
        model = get_peft_model(module, configs(part, module)[kind])
        shaken(model, "magnitude")
        model.save_pretrained(tmp_path / part)
    method = kind.partition(" ")[0] if kind.startswith("lo") else "locon"
    _goes_on(base, load_adapter(tmp_path), said(other), method, {"dora": True} if kind == "dora" else {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains_on_in_float32(dtype: torch.dtype, base: Base) -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(3, 128).to(dtype), torch.randn(128, 3).to(dtype)
    live = on_modules_of(base, adapter := Adapter({path: (low_rank(down, up, 2.0),)}), "lora")
    live.load(adapter)
    found = {name.rpartition(".")[2]: value for name, value in live.trainable().items()}
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert torch.equal(found["lora_down"], down.float())
    assert torch.equal(found["lora_up"], up.float())
    live.detach()


def test_lengths_of_a_plain_lora_become_those_that_it_makes(folders: Path) -> None:
    """Going on as DoRA changes nothing at first."""
    base = fresh(folders / "sd1")
    paths = {part: choose_layers(part, module, "all") for part, module in parts_of(base).items()}
    spec = Spec(paths, 2, 3.0, 0, get_method("lora").read_options({}))
    live = get_method("lora").attach(base, spec)
    shake(live)
    plain, wanted = live.adapter({}), said(base)
    live.detach()
    _goes_on(base, plain, wanted, "locon", {"dora": True})


def states(base: Base) -> Tensor:
    with torch.no_grad():
        return base.condition(["a <zorp> in the snow"]).hidden_states


def word(
    base: Base, method: str = "textual-inversion", name: str = "<zorp>", seed: int = 0, **options: Any
) -> Attached:
    chosen = get_method(method)
    paths = {"unet": choose_layers("unet", base.unet, "attention")}
    return chosen.attach(base, Spec(paths, 2, 3.0, seed, chosen.read_options(options), name, "dog"))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("method", ["textual-inversion", "pivotal"])
def test_words_go_on_and_keep_the_lengths_of_the_file(method: str, family: str, folders: Path, tmp_path: Path) -> None:
    base = fresh(folders / family)
    live = word(base, method, "<other>", vectors=2)
    shake(live)
    adapter = live.adapter({"method": method, "trigger": "<other>"})
    live.detach()
    file = adapter.save(tmp_path / "a.safetensors")
    renamed = replace(adapter, tokens={"<zorp>": adapter.tokens["<other>"]})
    with graft(base, {renamed: 1.0}):
        wanted, drawn = states(base), said(base)
    live = word(base, method, vectors=2, seed=3)
    parts = {part for vectors in adapter.tokens.values() for part in vectors}
    assert live.load(load_adapter(file)) == {*adapter.modules, *(f"{part}.<zorp>" for part in parts)}
    assert torch.equal(states(base), wanted)
    torch.testing.assert_close(said(base), drawn, rtol=1e-4, atol=1e-5)
    for part, vectors in live.adapter({}).tokens["<zorp>"].items():
        assert torch.equal(vectors, adapter.tokens["<other>"][part])
    shake(live)
    live.after_step()
    for part, vectors in live.adapter({}).tokens["<zorp>"].items():
        torch.testing.assert_close(vectors.norm(dim=1), adapter.tokens["<other>"][part].norm(dim=1))
    live.detach()


def test_pivotal_tuning_starts_from_a_word_or_from_weights_alone(folders: Path) -> None:
    base = fresh(folders / "sd1")
    live = word(base, "pivotal")
    shake(live)
    both = live.adapter({})
    live.detach()
    for part, taken in (
        (replace(both, deltas={}), {"text_encoder.<zorp>"}),
        (replace(both, tokens={}), set(both.modules)),
    ):
        live = word(base, "pivotal", seed=2)
        untrained = live.adapter({})
        assert live.load(part) == taken
        now = live.adapter({})
        live.detach()
        wanted = both if part.tokens else untrained
        assert torch.equal(now.tokens["<zorp>"]["text_encoder"], wanted.tokens["<zorp>"]["text_encoder"])
        wanted = untrained if part.tokens else both
        for path, (delta,) in now.deltas.items():
            assert all(torch.equal(leaf, wanted.deltas[path][0].leaves[n]) for n, leaf in delta.leaves.items())


BUILT: dict[str, Any] = {"structure": [1, 1.5, 1], "activation": "relu"}


@pytest.mark.parametrize("dialect", ["diffgraft", "webui"])
@pytest.mark.parametrize("dropout", [[], [0, 0.3, 0]])
def test_hypernetworks_go_on_with_another_dropout(
    dropout: list[float], dialect: str, folders: Path, tmp_path: Path
) -> None:
    """Behind a layer that drops something, the others have other numbers."""
    base = fresh(folders / "sd1")
    made = get_method("hypernetwork")
    live = made.attach(base, Spec({}, 1, 1.0, 0, made.read_options({**BUILT, "dropout": dropout})))
    shake(live, size=0.1)
    live.eval()
    wanted = said(base)
    file = live.adapter({}).save(tmp_path / ("a.pt" if dialect == "webui" else "a.safetensors"), dialect)
    live.detach()
    for other in ([], [0, 0.2, 0]):
        live = made.attach(base, Spec({}, 1, 1.0, 9, made.read_options({**BUILT, "dropout": other})))
        live.eval()
        assert (said(base) - wanted).abs().max() > 1e-3
        assert live.load(load_adapter(file)) == set(live.paths().values())
        torch.testing.assert_close(said(base), wanted)
        live.detach()


def test_what_has_no_place_or_does_not_fit_is_told(base: Base) -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    fits, wide = low_rank(torch.ones(3, 128), torch.ones(128, 3)), low_rank(torch.ones(3, 128), torch.ones(129, 3))
    loha = read_delta(
        "loha", {f"hada_w{n}_{s}": torch.ones(*z) for n in (1, 2) for s, z in (("a", (128, 2)), ("b", (2, 128)))}, None
    )
    dora = read_delta("lora", {**fits.leaves, "dora_scale": torch.ones(128)}, 1.0)
    of_inputs = read_delta("lora", {**fits.leaves, "dora_scale": torch.ones(1, 128)}, 1.0)
    one = Adapter({path: (fits,)})
    for method, options, adapter, answer in (
        ("lora", {}, Adapter({"unet.conv_in": (fits,)}), r"1 of its 1 modules are not adapted here: unet\.conv_in"),
        ("lora", {}, Adapter({path: (fits, fits)}), "has 2 deltas, and only one can be trained"),
        ("lora", {}, Adapter({path: (wide,)}), "does not fit this base's layer of shape 128 × 128"),
        ("lora", {}, Adapter({path: (loha,)}), "is a loha, but this run trains a lora"),
        ("loha", {}, one, "is a lora, but this run trains a loha"),
        ("lora", {}, Adapter({path: (dora,)}), r"is a DoRA \(options\.dora=true of lora and locon\)"),
        ("lora", {"dora": True}, Adapter({path: (of_inputs,)}), "is a DoRA with norms of the inputs"),
        ("lora", {}, replace(one, tokens={"<a>": {"text_encoder": torch.ones(1, 64)}}), "it holds a word"),
        ("full", {}, Adapter({path: (wide,)}), "does not fit this base's layer of shape 128 × 128"),
        ("full", {}, Adapter({"unet.conv_inn": (fits,)}), r"unet\.conv_inn is not trained here"),
        ("textual-inversion", {}, one, "it holds weights of layers"),
        ("hypernetwork", {}, one, "it holds weights of layers"),
        ("hypernetwork", {}, Adapter(), r"it holds 0 networks \(none\), but exactly one hypernetwork is needed"),
    ):
        live = on_modules_of(base, one, method, **options)
        with pytest.raises(ValueError, match=answer):
            live.load(adapter)
        live.detach()


def test_words_and_networks_of_another_size_are_told(base: Base) -> None:
    def refused(live: Attached, adapter: Adapter, answer: str) -> None:
        with pytest.raises(ValueError, match=answer):
            live.load(adapter)
        live.detach()

    def rows(*sides: int, part: str = "text_encoder") -> Adapter:
        return Adapter(tokens={"<a>": {part: torch.ones(*sides)}})

    refused(word(base), rows(3, 64), r"its word has 3 embeddings, but this run trains 1: set options\.vectors=3")
    refused(word(base), rows(1, 48), "for text_encoder have width 48: they are for another kind of base")
    refused(word(base), rows(1, 64, part="text_encoder_2"), "for text_encoder_2 have width 64: they are for")
    two = {name: {"text_encoder": torch.ones(1, 64)} for name in ("<a>", "<b>")}
    refused(word(base), Adapter(tokens=two), "it holds 2 words; only a single one can be trained")
    made = get_method("hypernetwork")

    def network(**options: Any) -> Attached:
        return made.attach(base, Spec({}, 1, 1.0, 0, made.read_options(options)))

    live = network(**BUILT)
    held = live.adapter({})
    live.detach()
    said_so = r"set options\.structure=1,1\.5,1 options\.activation=relu options\.activate_output=false options\.layer"
    for options in ({}, {**BUILT, "structure": [1, 2, 1]}, {**BUILT, "activation": "elu"}):
        refused(network(**options), held, said_so)
    narrow = HypernetworkOptions.model_validate(BUILT).model_dump()
    tensors = {name.replace("128-", "96-"): value for name, value in held.networks[0].tensors.items()}
    other = type(held.networks[0])({k: v for k, v in tensors.items() if k.startswith("64-")}, narrow)  # type: ignore[call-arg]
    live = network(**BUILT)
    assert live.load(Adapter(networks=(other,))) == {"unet.64-k", "unet.64-v"}
    live.detach()


def test_a_method_that_has_no_way_to_says_so() -> None:
    class Bare(Attached):
        def trainable(self) -> Any:
            return {}

        def adapter(self, metadata: Any) -> Adapter:
            return Adapter({}, metadata)

        def detach(self) -> None: ...

    with pytest.raises(ValueError, match="this method does not support init_from"):
        Bare().load(Adapter())
