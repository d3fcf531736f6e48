"""Every method that changes weights, through the registry: attached, merged, saved, stacked, taken off."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffgraft.adapters.adapter import Adapter, LinearDelta
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.patch import weight_shape
from diffgraft.adapters.registry import methods, written_dialects
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from tests.adapters.toys import (
    ONE_SIDED,
    PATHS,
    VARIANTS,
    Net,
    attach,
    changes_weights,
    deltas_of,
    input_of,
    name_of,
    shake,
    starts_from_weight,
)

# full fine-tuning is no layer beside the frozen one, and starts from it without chance
BESIDE = [variant for variant in VARIANTS if variant[0] != "full"]
every_beside = pytest.mark.parametrize(("method", "options"), BESIDE, ids=[name_of(variant) for variant in BESIDE])
every = pytest.mark.parametrize(("method", "options"), VARIANTS, ids=[name_of(variant) for variant in VARIANTS])


def test_every_way_of_writing_a_delta_is_in_the_matrix() -> None:
    assert {name for name, _ in VARIANTS} == {name for name, method in methods().items() if changes_weights(method)}
    assert {"lora", "locon", "loha", "lokr", "full"} <= {name for name, _ in VARIANTS}
    assert len(VARIANTS) >= 16


@every
def test_attached_is_merged_is_the_delta_in_float64(method: str, options: dict[str, Any]) -> None:
    net = Net()
    live = attach(net, method, options)
    shake(live)
    x = input_of(net)
    with torch.no_grad():
        wanted = net(x)
        adapter = Adapter({path: (delta,) for path, delta in deltas_of(live).items()})
        live.detach()
        bare = net(x)
        with graft(net, {adapter: 1.0}):
            merged = net(x)
        exact = copy.deepcopy(net).double()
        for path, (delta,) in adapter.deltas.items():
            layer = exact.get_submodule(path.removeprefix("unet."))
            weight, bias = delta.apply(layer.weight, layer.bias, 1.0)  # type: ignore[arg-type]
            layer.weight.copy_(weight)  # type: ignore[operator]
            if bias is not None:
                layer.bias.copy_(bias)  # type: ignore[operator]
        exactly = exact(x.double())
    assert (bare - wanted).abs().max() > 0.05
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(exactly.float(), wanted, rtol=1e-4, atol=2e-5)


@every
def test_a_fresh_adapter_is_the_base_and_taking_it_off_leaves_every_bit(method: str, options: dict[str, Any]) -> None:
    net = Net()
    before = {name: (value, value.clone()) for name, value in net.state_dict(keep_vars=True).items()}
    x = input_of(net)
    bare = net(x)
    live = attach(net, method, options)
    torch.testing.assert_close(net(x), bare, rtol=1e-5, atol=1e-6 if options.get("dora") else 0)
    assert list(net.state_dict()) == list(before)
    shake(live)
    assert not torch.equal(net(x), bare)
    live.detach()
    assert torch.equal(net(x), bare)
    for name, value in net.state_dict(keep_vars=True).items():
        kept, bits = before[name]
        assert value is kept
        assert torch.equal(kept, bits)


@every
def test_strength_zero_is_the_base_and_strengths_scale_what_is_linear(method: str, options: dict[str, Any]) -> None:
    net = Net()
    live = attach(net, method, options)
    shake(live)
    deltas = deltas_of(live)
    live.detach()
    adapter = Adapter({path: (delta,) for path, delta in deltas.items()})
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with graft(net, {adapter: 0}):
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for path, delta in deltas.items():
        if isinstance(delta, LinearDelta):
            weight = net.get_submodule(path.removeprefix("unet.")).weight
            assert isinstance(weight, torch.Tensor)
            half, _ = delta.apply(weight, None, -0.5)
            shape = tuple(weight.shape)
            torch.testing.assert_close(half, weight - 0.5 * delta.delta(shape))


@every
def test_attached_at_a_strength_is_merged_at_that_strength(method: str, options: dict[str, Any]) -> None:
    """So that objectives may train at strengths other than 1, such as −1."""
    net = Net()
    live = attach(net, method, options)
    assert live.has_strength != (method in ("full", "oft", "boft") or "dora" in options)
    if not live.has_strength:
        return
    shake(live)
    x = input_of(net)
    adapter = Adapter({path: (delta,) for path, delta in deltas_of(live).items()})
    with torch.no_grad():
        whole = net(x)
        with live.at_strength(-1.0):
            opposite = net(x)
            with live.disabled():
                bare = net(x)
        assert torch.equal(net(x), whole)
        live.detach()
        assert torch.equal(net(x), bare)
        assert (opposite - bare).abs().max() > 0.05
        with graft(net, {adapter: -1.0}):
            torch.testing.assert_close(net(x), opposite, rtol=1e-3, atol=1e-4)


@every_beside
def test_only_the_adapter_gets_gradients_and_they_are_those_of_the_plain_formula(
    method: str, options: dict[str, Any]
) -> None:
    """The fast forward against the layer run with the whole matrix, in float64."""
    net = Net().requires_grad_(False)
    live = attach(net, method, options)
    shake(live)
    x = input_of(net)
    net(x).square().mean().backward()
    found = {name: value.grad for name, value in live.trainable().items()}
    assert all(grad is not None and grad.abs().max() > 0 for grad in found.values())
    assert all(value.grad is None for value in net.parameters())
    if options.get("dora"):
        return  # no gradient flows through its norm, by design
    if method == "tlora" and options.get("init") != "zero":
        return  # its parameters are not the leaves of files: see test_tlora.py
    deltas = deltas_of(live)
    leaves = {
        path: {n: v.double().requires_grad_() for n, v in d.leaves.items() if f"{path}.{n}" in found}
        for path, d in deltas.items()
    }
    live.detach()
    exact = copy.deepcopy(net).double()
    weights = {}
    for path, delta in deltas.items():
        layer = exact.get_submodule(path.removeprefix("unet."))
        if isinstance(delta, FactorDelta):
            weight = layer.weight + delta.scale * delta.factors.weight(leaves[path], weight_shape(layer))
        else:
            whole = replace(delta, leaves={**delta.leaves, **leaves[path]})  # type: ignore[type-var]
            weight = whole.apply(layer.weight, None, 1.0)[0].double()  # type: ignore[arg-type]
        weights[f"{path.removeprefix('unet.')}.weight"] = weight
    torch.func.functional_call(exact, weights, (x.double(),)).square().mean().backward()
    assert sum(map(len, leaves.values())) == len(found)
    for path, named in leaves.items():
        for name, leaf in named.items():
            assert leaf.grad is not None
            gradient = found[f"{path}.{name}"]
            assert gradient is not None
            trained = leaf.grad[tuple(slice(side) for side in gradient.shape)]  # the rest is a fixed start
            assert (gradient - trained).norm() < 1e-4 * trained.norm()


@every
def test_saved_and_loaded_are_the_same_bits(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    live = attach(Net(), method, options)
    shake(live)
    adapter = Adapter({path: (delta,) for path, delta in deltas_of(live).items()}, {"method": method})
    held = 0
    for dialect in ("auto", *written_dialects()):
        try:
            file = adapter.save(tmp_path / f"{dialect}.safetensors", dialect)
        except DiffgraftError:
            continue
        held += 1
        again = load_adapter(file)
        assert again.method == method
        assert set(again.modules) == set(adapter.modules)
        for path, (delta,) in adapter.deltas.items():
            (other,) = again.deltas[path]
            assert set(other.leaves) == set(delta.leaves)
            if not any(key.endswith("lora_B.weight") for key in load_file(file)):  # which has the scale in the factors
                assert all(torch.equal(leaf, other.leaves[name]) for name, leaf in delta.leaves.items())
            weight = torch.randn(weight_shape(Net().get_submodule(path.removeprefix("unet."))))
            torch.testing.assert_close(other.apply(weight, None, 0.7)[0], delta.apply(weight, None, 0.7)[0])
    assert held >= 2


@every
def test_what_does_not_fit_is_told(method: str, options: dict[str, Any]) -> None:
    net = Net()
    deltas = deltas_of(attach(net, method, options))
    for path, delta in deltas.items():
        shape = weight_shape(net.get_submodule(path.removeprefix("unet.")))
        assert delta.fits(shape)
        more_outputs, more_inputs = (shape[0] + 1, *shape[1:]), (shape[0], shape[1] * 2 + 1, *shape[2:])
        if method in ONE_SIDED or all(leaf.numel() == shape[0] for leaf in delta.leaves.values()):
            assert [delta.fits(more_outputs), delta.fits(more_inputs)].count(True) == 1
            continue
        assert not delta.fits(more_outputs)
        assert not delta.fits(more_inputs)
        assert not delta.fits((*shape, 2))


@every
def test_what_leaves_say_of_the_weight_is_so(method: str, options: dict[str, Any]) -> None:
    net = Net()
    live = attach(net, method, options)
    shake(live)
    for path, delta in deltas_of(live).items():
        shape = weight_shape(net.get_submodule(path.removeprefix("unet.")))
        assert delta.weight_shape in (None, shape)
        if (matrix := delta.matrix_shape) is not None:
            assert (matrix[0], math.prod(matrix[1:])) == (shape[0], math.prod(shape[1:]))
        product = delta.low_rank_factors(-0.7) if isinstance(delta, LinearDelta) else None
        assert (product is not None) == delta.is_low_rank
        if product is not None:
            up, down = product
            torch.testing.assert_close((up @ down).view(shape), -0.7 * delta.delta(shape))  # type: ignore[attr-defined]


@every_beside
def test_the_seed_decides_the_start_and_leaves_the_global_generator_alone(method: str, options: dict[str, Any]) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        return {name: value.detach() for name, value in attach(Net(), method, options, seed=seed).trainable().items()}

    first, again, other = start(5), start(5), start(6)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    # what starts at zero throughout starts without chance
    starts_with_chance = any(not torch.equal(value, other[name]) or not value.any() for name, value in first.items())
    assert starts_with_chance != starts_from_weight(options)
    net = Net()
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    attach(net, method, options)
    assert torch.equal(torch.rand(3), wanted)


@every_beside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_trains_in_float32_beside_a_base_of_half_precision(
    method: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    exact, half = Net(), Net().to(dtype)
    lives = [attach(net, method, options) for net in (exact, half)]
    for live in lives:
        shake(live, size=0.1)
        assert {value.dtype for value in live.trainable().values()} == {torch.float32}
    wanted, found = exact(input_of(exact)), half(input_of(half))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.05)
    found.float().square().mean().backward()
    assert all(value.grad is not None for value in lives[1].trainable().values())


@pytest.mark.parametrize("first", VARIANTS, ids=name_of)
@pytest.mark.parametrize("second", BESIDE[::3], ids=name_of)
def test_any_two_lie_over_one_another(first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]]) -> None:
    """Attached they do what the two deltas do one after the other; taken off in either order, the base is back."""
    net = Net()
    x = input_of(net)
    bare = net(x)
    lives = [attach(net, *first), attach(net, *second, seed=8)]
    for seed, live in enumerate(lives):
        shake(live, seed=seed, size=0.2)
    alone = [deltas_of(live) for live in lives]
    together = net(x)
    linear = all(isinstance(delta, LinearDelta) for deltas in alone for delta in deltas.values())
    if linear:
        adapters = {Adapter({path: (delta,) for path, delta in deltas.items()}): 1.0 for deltas in alone}
        lives[0].detach()
        lives[1].detach()
        with graft(net, adapters):
            torch.testing.assert_close(net(x), together, rtol=1e-3, atol=1e-4)
    else:
        lives[0].detach()
        only = net(x)
        lives[1].detach()
        live = attach(net, *second, seed=8)
        shake(live, seed=1, size=0.2)
        torch.testing.assert_close(net(x), only, rtol=0, atol=0)
        live.detach()
    assert torch.equal(net(x), bare)


@every
def test_gradient_checkpointing_gives_the_same_gradients(method: str, options: dict[str, Any]) -> None:
    from torch.utils.checkpoint import checkpoint

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        net = Net().requires_grad_(False)
        live = attach(net, method, options)
        shake(live)
        x = input_of(net)
        out = checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)
        assert isinstance(out, torch.Tensor)
        out.square().mean().backward()
        return [value.grad for value in live.trainable().values() if value.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) > 0
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other)


def test_options_are_checked() -> None:
    method = methods()["loha"]
    with pytest.raises(DiffgraftError, match=r"no option 'tuker': did you mean 'options.tucker'"):
        method.read_options({"tuker": True})
    with pytest.raises(DiffgraftError, match=r"Invalid value options.conv_rank=0: "):
        method.read_options({"conv_rank": 0})
    options = method.read_options({"conv_rank": "4", "tucker": "true"})
    assert options.model_dump(exclude_defaults=True) == {"conv_rank": 4, "tucker": True}


def test_patterns_choose_rank_and_alpha_and_rates() -> None:
    live = attach(Net(), "lora", {"ranks": {"*.out": 5}, "alphas": {"unet.w*": 7.0}, "loraplus_ratio": 16})
    deltas = deltas_of(live)
    sides = {path: (delta.leaves["lora_down"].shape[0], delta.alpha) for path, delta in deltas.items()}
    assert sides["unet.out"] == (5, 7.5)  # of the same scale as all others
    assert sides["unet.wide"] == (3, 7.0)
    assert sides["unet.narrow"] == (3, 4.5)
    assert live.lr_scales() == {f"unet.{path}.lora_up": 16 for path in PATHS}
    assert set(live.lr_scales()) < set(live.trainable())


@pytest.mark.parametrize(("method", "bound"), [("lora", 3), ("loha", 3 * 3), ("lokr", 4 * 6)])
def test_the_rank_of_the_matrix_is_its_bound(method: str, bound: int) -> None:
    """A Kronecker product has the product of the ranks: of w1, which is 5 × 4 here, and of w2, which is 6 × 6."""
    net = nn.ModuleDict({"layer": nn.Linear(24, 30)})
    chosen = methods()[method]
    from diffgraft.adapters.method import Spec

    live = chosen.attach(SimpleNamespace(unet=net), Spec({"unet": ["layer"]}, 3, 3.0, 0, chosen.read_options({})))
    shake(live)
    (delta,) = deltas_of(live).values()
    assert isinstance(delta, LinearDelta)
    assert int(torch.linalg.matrix_rank(delta.delta((30, 24)).double(), rtol=1e-5)) == bound


def test_full_trains_a_copy_in_float32_and_nothing_of_the_base() -> None:
    net = Net().half().requires_grad_(False)
    kept = dict(net.named_parameters())
    bits = {name: value.clone() for name, value in kept.items()}
    live = attach(net, "full", {})
    assert set(live.trainable()) == {f"unet.{name}" for name in kept}
    assert {value.dtype for value in live.trainable().values()} == {torch.float32}
    net(input_of(Net())).square().mean().backward()
    assert all(value.grad is not None for value in live.trainable().values())
    live.detach()
    for name, value in net.named_parameters():
        assert value is kept[name]
        assert torch.equal(value, bits[name])
        assert value.grad is None
        assert not value.requires_grad


@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.8}])
def test_full_is_reduced_to_the_nearest_lora(options: dict[str, Any]) -> None:
    """Against NumPy's decomposition in float64: what is left out are the smallest singular values."""
    net = Net()
    live = attach(net, "full", options)
    shake(live)
    kept = {name: value.detach().clone() for name, value in live.trainable().items()}
    small = deltas_of(live)
    live.detach()
    assert set(small) == {f"unet.{path}" for path in PATHS}
    for path, delta in small.items():
        layer = net.get_submodule(path.removeprefix("unet."))
        diff = (kept[f"{path}.weight"] - layer.weight).detach().double().flatten(1).numpy()
        s = np.linalg.svd(diff, compute_uv=False)
        share = np.cumsum(s**2) / np.sum(s**2)
        rank = options.get("rank") or int(np.argmax(share >= options["energy"])) + 1
        assert isinstance(delta, FactorDelta)
        assert (delta.kind, delta.rank) == ("lora", rank)
        left = np.linalg.norm(delta.delta(weight_shape(layer)).flatten(1).numpy() - diff)
        assert abs(left - np.sqrt(np.sum(s[rank:] ** 2))) < 1e-5 * np.linalg.norm(diff)


@pytest.mark.parametrize("bits", [8, 4])
@every_beside
def test_it_trains_beside_quantised_layers(method: str, options: dict[str, Any], bits: int) -> None:
    """Close to what it does beside the whole ones, and into quantised weights nothing is merged."""
    import bitsandbytes as bnb

    torch.manual_seed(4)
    whole = nn.ModuleDict({"layer": nn.Linear(64, 96)})
    kind = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False) if bits == 8 else bnb.nn.Linear4bit(64, 96)
    kind.load_state_dict(whole["layer"].state_dict())
    options = {key: value for key, value in options.items() if key not in ("ranks", "alphas")}  # of other layers
    packed = nn.ModuleDict({"layer": kind.to("cpu")})
    if options.get("dora") or starts_from_weight(options):
        answer = r"unquantized weights of the base: set options\.dora=false|cannot start at unet.layer: its weight is"
        with pytest.raises(DiffgraftError, match=answer):
            attach(packed, method, options, ["layer"])
        return
    lives = [attach(net, method, options, ["layer"]) for net in (whole, packed)]
    for live in lives:
        shake(live)
    x = torch.randn(5, 64)
    wanted, found = whole["layer"](x), packed["layer"](x)
    assert (found - wanted).norm() < 0.2 * wanted.norm()
    for out in (wanted, found):
        out.float().square().mean().backward()
    for one, other in zip(*(live.trainable().values() for live in lives), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).norm() < 0.3 * one.grad.norm()
    adapter = Adapter({path: (delta,) for path, delta in deltas_of(lives[1]).items()})
    with pytest.raises(DiffgraftError, match="quantized"):
        graft(packed, {adapter: 1.0})


@pytest.mark.parametrize("method", ["lora", "loha", "full"])
def test_it_trains_in_a_compiled_model(method: str) -> None:
    net = Net().requires_grad_(False)
    live = attach(net, method, {})
    shake(live)
    x = input_of(net)
    net(x).square().mean().backward()
    wanted = [value.grad.clone() for value in live.trainable().values() if value.grad is not None]
    for value in live.trainable().values():
        value.grad = None
    compiled = torch.compile(net, backend="aot_eager")
    compiled(x).square().mean().backward()
    for value, gradient in zip(live.trainable().values(), wanted, strict=True):
        assert value.grad is not None
        torch.testing.assert_close(value.grad, gradient)
