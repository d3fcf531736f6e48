"""Held to independent implementations: the same leaves in peft's and lycoris-lora's layers do the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffgraft.adapters.method import Attached, Spec
from diffgraft.adapters.methods.lokr import factorize
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.bases.unet import unet_arguments
from diffgraft.generation.graft import graft
from tests.adapters.toys import attach, input_of, name_of, shake


class Net(nn.Module):
    """Layers that the peers know: no padding but zeros, no groups, no dilation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.wide = nn.Conv2d(6, 10, 3, padding=1)
        self.narrow = nn.Conv2d(10, 14, 1, bias=False)
        self.strided = nn.Conv2d(14, 12, (3, 5), stride=2, padding=(1, 2))
        self.out = nn.Linear(12, 22)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.strided(self.narrow(self.wide(x))).mean((2, 3)))
        return y


PATHS = ["wide", "narrow", "strided", "out"]
Theirs = dict[str, Tensor]


def ours(method: str, options: dict[str, Any], alpha: float = 4.5) -> tuple[Net, Attached]:
    net = Net().requires_grad_(False)
    live = attach(net, method, options, PATHS, alpha=alpha)
    shake(live)
    return net, live


def compare(net: Net, live: Attached, other: Net, theirs: dict[str, nn.Parameter], apart: tuple[str, ...] = ()) -> None:
    """`theirs`: our name of a leaf → their parameter that holds the same; leaves in `apart` have other gradients."""
    x = input_of(net)
    wanted, found = other(x), net(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    wanted.square().mean().backward()
    found.square().mean().backward()
    trainable = live.trainable()
    assert set(theirs) == set(trainable)
    for name, value in trainable.items():
        gradient, reference = value.grad, theirs[name].grad
        assert gradient is not None
        assert reference is not None
        reference = reference.reshape(gradient.shape)
        assert reference.norm() > 0, name
        alike = (gradient - reference).norm() < 1e-4 * reference.norm()
        assert alike == (name.rpartition(".")[2] not in apart or ".narrow." in name or ".out." in name), name


@torch.no_grad()
def fill(theirs: dict[str, nn.Parameter], live: Attached) -> None:
    for name, value in live.trainable().items():
        theirs[name].copy_(value.reshape(theirs[name].shape))


_PEFT = {
    "lora": {"lora_down": "lora_A", "lora_up": "lora_B", "magnitude": "lora_magnitude_vector"},
    "loha": {name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    "lokr": {f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}


@pytest.mark.parametrize(
    "variant",
    [
        ("lora", {}),
        ("lora", {"rslora": True}),
        ("lora", {"dora": True}),
        ("locon", {}),
        ("loha", {}),
        ("loha", {"tucker": True}),
        ("lokr", {}),
        ("lokr", {"decompose_both": True}),
        ("lokr", {"tucker": True, "factor": 2}),
    ],
    ids=name_of,
)
def test_peft(variant: tuple[str, dict[str, Any]]) -> None:
    from peft import LoHaConfig, LoKrConfig, LoraConfig
    from peft.tuners.loha import LoHaModel
    from peft.tuners.lokr import LoKrModel
    from peft.tuners.lora import LoraModel

    method, options = variant
    # LoKr with both factors whole has no scale in LyCORIS and here; peft scales it all the same
    net, live = ours(method, options, alpha=3 if method == "lokr" else 4.5)
    other = Net()
    common: dict[str, Any] = {"r": 3, "target_modules": PATHS}
    if method in ("lora", "locon"):
        flags = {"use_dora": options.get("dora", False), "use_rslora": options.get("rslora", False)}
        LoraModel(other, {"x": LoraConfig(**common, lora_alpha=4.5, **flags)}, "x")
    elif method == "loha":
        effective = options.get("tucker", False)
        LoHaModel(other, {"x": LoHaConfig(**common, alpha=4.5, use_effective_conv2d=effective)}, "x")
    else:
        more = {"use_effective_conv2d": options.get("tucker", False), "decompose_factor": options.get("factor", -1)}
        more["decompose_both"] = options.get("decompose_both", False)
        LoKrModel(other, {"x": LoKrConfig(**common, alpha=3, **more)}, "x")
    names = _PEFT["lora" if method == "locon" else method]
    theirs = {}
    for name in live.trainable():
        path, leaf = name.removeprefix("unet.").replace(".direction", "").split(".")
        holder = getattr(other.get_submodule(path), names[leaf])["x"]
        theirs[name] = holder if isinstance(holder, nn.Parameter) else holder.weight
    fill(theirs, live)
    # peft 0.21.2's backward pass takes the other side's kernel for these two; LyCORIS and float64 say what we say
    wrong_there = ("hada_w1_a", "hada_w2_a") if method == "loha" and options.get("tucker") else ()
    compare(net, live, other, theirs, wrong_there)


@pytest.mark.parametrize(
    "variant",
    [
        ("locon", {}),
        ("locon", {"tucker": True}),
        ("loha", {}),
        ("loha", {"tucker": True}),
        ("lokr", {}),
        ("lokr", {"decompose_both": True, "factor": 4}),
        ("lokr", {"full_matrix": True}),
        ("lokr", {"tucker": True, "factor": 2}),
    ],
    ids=name_of,
)
def test_lycoris(variant: tuple[str, dict[str, Any]]) -> None:
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    method, options = variant
    net, live = ours(method, options)
    other = Net()
    kind = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}[method]
    renamed = {"decompose_both": "decompose_both", "tucker": "use_tucker"}
    more = {renamed.get(name, name): value for name, value in options.items()}
    theirs = {}
    for path in PATHS:
        module = kind(path, other.get_submodule(path), 1.0, 3, 4.5, **more)
        module.apply_to()
        leaves = [name for name in live.trainable() if name.startswith(f"unet.{path}.")]
        for name in leaves:
            leaf = getattr(module, name.rpartition(".")[2])
            theirs[name] = leaf if isinstance(leaf, nn.Parameter) else leaf.weight
    fill(theirs, live)
    compare(net, live, other, theirs)


def test_what_starts_at_random_starts_as_lycoris_has_it() -> None:
    """Spread of the initial values, for LoHa; a hundredth off would show in so many numbers."""
    net = nn.ModuleDict({"layer": nn.Linear(300, 200)})
    from types import SimpleNamespace

    from lycoris.modules.loha import LohaModule

    from diffgraft.adapters.method import Spec
    from diffgraft.adapters.registry import get_method

    method = get_method("loha")
    spec = Spec({"unet": ["layer"]}, 40, 40.0, 0, method.read_options({}))
    found = method.attach(SimpleNamespace(unet=net), spec).trainable()
    torch.manual_seed(0)
    theirs = LohaModule("layer", nn.Linear(300, 200), 1.0, 40, 40.0)
    for name, value in found.items():
        reference = getattr(theirs, name.rpartition(".")[2])
        assert abs(float((value.std() - reference.std()).detach())) <= 0.03 * float(reference.detach().std()), name


@pytest.mark.parametrize(
    "variant",
    [
        ("lora", {}),
        ("locon", {"tucker": True, "dora": True}),
        ("loha", {}),
        ("loha", {"tucker": True}),
        ("lokr", {"factor": 4}),
        ("lokr", {"full_matrix": True}),
        ("full", {}),
    ],
    ids=name_of,
)
def test_lycoris_opens_our_files(
    variant: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LyCORIS, alone, makes the embedded base say what it says with our adapter in it."""
    from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights

    base = load_base("tiny")  # of its own: LyCORIS lets all of it train
    method, options = variant
    chosen = get_method(method)
    paths = {"unet": choose_layers("unet", base.unet, "all")}
    live = chosen.attach(base, Spec(paths, 3, 4.5, 0, chosen.read_options(options)))
    shake(live, size=0.02)
    file = live.adapter({}).save(tmp_path / "a.safetensors", "lycoris")
    live.detach()
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    told = unet_arguments(base.condition(["a dog", "a cat"]))

    @torch.no_grad()
    def said() -> Tensor:
        found: Tensor = base.unet(x, torch.tensor([300, 700]), **told).sample
        return found

    bare = said()
    with graft(base, {file: 1.0}):
        wanted = said()
    monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", "lora_unet")
    network, _ = create_lycoris_from_weights(1.0, str(file), base.unet)
    network.apply_to()
    try:
        found = said()
    finally:
        network.restore()
    assert (wanted - bare).abs().max() > 0.02
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(said(), bare)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(
    "variant",
    [("lora", {"dora": True}), ("lora", {"rslora": True}), ("locon", {}), ("locon", {"dora": True})],
    ids=name_of,
)
def test_diffusers_opens_our_files(
    variant: tuple[str, dict[str, Any]], strength: float, base: Base, tmp_path: Path
) -> None:
    """Diffusers and peft, alone, make the embedded base say what it says with our adapter in it."""
    method, options = variant
    chosen = get_method(method)
    parts = {"unet": base.unet, "text_encoder": base.text_encoder}
    paths = {name: choose_layers(name, part, chosen.layers) for name, part in parts.items()}
    live = chosen.attach(base, Spec(paths, 3, 4.5, 0, chosen.read_options(options)))
    shake(live, size=0.02)
    file = live.adapter({}).save(tmp_path / "a.safetensors", "diffusers")
    live.detach()
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def said(held: Base) -> Tensor:
        told = unet_arguments(held.condition(["a dog", "a cat"]))
        found: Tensor = held.unet(x, torch.tensor([300, 700]), **told).sample
        return found

    bare = said(base)
    with graft(base, {file: strength}):
        wanted = said(base)
    other = load_base("tiny")
    pipe = other.pipeline()
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
    pipe.set_adapters(["a"], [strength])
    assert (wanted - bare).abs().max() > 0.02
    torch.testing.assert_close(said(other), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 6, 8, 16, 64, 1000])
def test_lokr_divides_sides_as_lycoris_does(factor: int) -> None:
    from lycoris.functional.general import factorization

    for side in (1, 7, 12, 40, 127, 128, 250, 320, 360, 640, 768, 1280):
        assert factorize(side, factor) == factorization(side, factor), side
