"""ControlNet-LLLite and Control-LoRA, held to the formulas and files of their authors, and through a whole run."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import diffgraft as dg
from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.control import ConditionedNetwork
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Attached
from diffgraft.adapters.ops.convert import convert
from diffgraft.adapters.registry import methods
from diffgraft.bases import Base, SizeConditioning, load_base
from diffgraft.bases.family import ControlSignal
from diffgraft.bases.ldm_keys import UNET_PREFIX, ldm_state_dict
from diffgraft.bases.meta_base import meta_base
from diffgraft.bases.weights import open_weights
from diffgraft.devices import has_bfloat16
from diffgraft.errors import DiffgraftError
from diffgraft.generation.control import ControlInput
from diffgraft.generation.graft import graft
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.rng import normal
from diffgraft.trainers.denoiser import Denoiser
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.attach import attach
from diffgraft.trainers.runtime.checkpointing import recomputing
from tests.conftest import fresh
from tests.trainers.interrupt_helpers import interrupted_after
from tests.trainers.test_control import QUICK, drawing, drawings  # noqa: F401  (a fixture)
from tests.trainers.test_plan import cost_of

# ruff: noqa: F811  (a fixture of another file)
SMALL: dict[str, dict[str, Any]] = {
    "lllite": {"options": {"cond_emb_dim": 6, "mlp_dim": 10}},
    "control-lora": {"rank": 3},
}
"""Method → settings; no two sizes are equal"""
TIMES, PROMPTS = torch.tensor([20, 700]), ["a dog", ""]
every = pytest.mark.parametrize("method", SMALL)


def live_on(base: Base, method: str, **more: Any) -> Attached:
    """The method on a base, with random values everywhere."""
    live = attach(load_recipe("control", {"method": method, **SMALL[method], **more}), base)
    with torch.no_grad():
        for place, value in enumerate(live.trainable().values()):
            value.add_((0.3 if method == "lllite" else 0.1) * normal(tuple(value.shape), 4, place).to(value.device))
    return live


def adapter_on(base: Base, method: str) -> Adapter:
    live = live_on(base, method)
    live.detach()
    layers = {"layers_per_block": 1} if base.name == "tiny" else {}
    return live.adapter({"method": method, "base": {"family": base.family.name, **layers}})


def network_in(adapter: Adapter) -> ConditionedNetwork:
    (network,) = adapter.networks
    assert isinstance(network, ConditionedNetwork)
    return network


def shown(height: int = 64, width: int = 96) -> tuple[Tensor, Tensor]:
    """Noisy latents for a VAE of an eighth, and condition pictures from 0 to 1."""
    return normal((2, 4, height // 8, width // 8), 3), torch.rand(2, 3, height, width, generator=torch.manual_seed(5))


def frames_of(pictures: Tensor) -> list[SizeConditioning]:
    height, width = pictures.shape[-2:]
    return [SizeConditioning((height, width), (0, 0), (height, width), picture) for picture in pictures]


def predicted(base: Base, noisy: Tensor, pictures: Tensor, network: nn.Module | None, strength: float = 1) -> Tensor:
    """The prediction of a base steered by a network that was built."""
    sizes = base.family.size_conditioning(frames_of(pictures))
    control = None if network is None else ControlSignal(network, pictures, strength)
    with torch.no_grad():
        conditioning = replace(base.condition(PROMPTS).with_size(sizes), control=control)
        return base.family.denoise(base, base.denoiser, noisy, TIMES, conditioning)


def path_of(module: str) -> str:
    """Diffusers' path of a layer in SDXL for a module of a file of ControlNet-LLLite."""
    found = re.fullmatch(
        r"lllite_unet_(input_blocks_(\d+)|middle_block)_1_transformer_blocks_(\d+)_(attn\d)_(\w+)", module
    )
    assert found is not None
    level, number = divmod(int(found[2]) - 1, 3) if found[2] else (0, 0)
    block = f"down_blocks.{level}.attentions.{number}" if found[2] else "mid_block.attentions.0"
    return f"{block}.transformer_blocks.{found[3]}.{found[4]}.{found[5]}"


def lllite_formula(own: dict[str, Tensor], x: Tensor, pictures: Tensor) -> Tensor:
    """What sd-scripts adds to the input of a layer, from the leaves of its module."""
    seen = 2 * pictures - 1
    for place in (0, 2, 4):
        if f"conditioning1.{place}.weight" in own:
            seen = seen if place == 0 else seen.relu()
            weight = own[f"conditioning1.{place}.weight"]
            seen = F.conv2d(seen, weight, own[f"conditioning1.{place}.bias"], stride=weight.shape[-1])
    seen = seen.reshape(*seen.shape[:2], -1).permute(0, 2, 1)
    inner = F.linear(x, own["down.0.weight"], own["down.0.bias"]).relu()
    inner = F.linear(torch.cat([seen, inner], -1), own["mid.0.weight"], own["mid.0.bias"]).relu()
    return F.linear(inner, own["up.0.weight"], own["up.0.bias"])


@contextmanager
def by_formula(base: Base, tensors: dict[str, Tensor], pictures: Tensor, strength: float) -> Iterator[None]:
    """The formula on the layers that the keys of a file name."""
    leaves: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        leaves.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = value

    def hook(own: dict[str, Tensor]) -> Callable[..., Any]:
        return lambda _, args: (args[0] + strength * lllite_formula(own, args[0], pictures),)

    hooks = [
        base.denoiser.get_submodule(path_of(name)).register_forward_pre_hook(hook(own)) for name, own in leaves.items()
    ]
    yield
    for own in hooks:
        own.remove()


def test_lllite_is_the_formula_of_sd_scripts(folders: Path, tmp_path: Path) -> None:
    """Predictions and gradients in float64 from the keys of the file, on an SDXL with all three sizes of tokens."""
    base = fresh(folders / "sdxl")
    live, (noisy, pictures) = live_on(base, "lllite"), shown()
    goal = normal(tuple(noisy.shape), 9)
    steered = Denoiser(base, live)(noisy, TIMES, PROMPTS, frames_of(pictures))
    (steered - goal).square().sum().backward()
    gradients = {name: value.grad for name, value in live.trainable().items()}
    live.detach()
    file = live.adapter({"method": "lllite"}).save(tmp_path / "lines.safetensors")
    tensors = {key: value.double().requires_grad_() for key, value in load_file(file).items()}
    assert {key.partition(".")[0].rpartition("_attn")[2] for key in tensors} == {"1_to_q", "1_to_k", "1_to_v", "2_to_q"}
    kernels = {
        tuple(v.shape[-1] for k, v in tensors.items() if k.startswith(f"{name}.con") and v.ndim == 4)
        for name in {key.partition(".")[0] for key in tensors}
    }
    assert kernels == {(4, 4), (4, 4, 2)}, "as sd-scripts has them for tokens of 16 and 32 pixels"
    exact = deepcopy(base)
    exact.denoiser.double()
    sizes = base.family.size_conditioning(frames_of(pictures))
    conditioning = base.condition(PROMPTS).with_size(sizes)
    conditioning = replace(
        conditioning,
        hidden_states=conditioning.hidden_states.double(),
        added={name: value.double() for name, value in conditioning.added.items()},
    )
    with by_formula(exact, tensors, pictures.double(), 1.0):
        wanted = exact.family.denoise(exact, exact.denoiser, noisy.double(), TIMES, conditioning)
    (wanted - goal).square().sum().backward()
    bare = predicted(base, noisy, pictures, None)
    assert (steered - bare).abs().max() > 0.02
    torch.testing.assert_close(steered.double(), wanted, rtol=1e-5, atol=1e-5)
    for key, value in tensors.items():
        module, _, leaf = key.partition(".")
        ours = gradients[f"control.{path_of(module)}.{leaf}"]
        assert ours is not None
        assert value.grad is not None
        assert value.grad.abs().max() > 0
        assert (ours - value.grad).norm() < 1e-4 * value.grad.norm() + 1e-6
    # built from the file, at another strength, and on sides that are no multiples of the tokens'
    again = network_in(load_adapter(file)).build(base)
    plain = {key: value.detach().float() for key, value in tensors.items()}
    for height, width, strength in ((64, 96, 0.6), (48, 80, 1.0)):
        noisy, pictures = shown(height, width)
        with by_formula(base, plain, pictures, strength) if height == 64 else _padded(base, plain, pictures):
            wanted = predicted(base, noisy, pictures, None)
        torch.testing.assert_close(predicted(base, noisy, pictures, again, strength), wanted, rtol=1e-4, atol=1e-5)


@contextmanager
def _padded(base: Base, tensors: dict[str, Tensor], pictures: Tensor) -> Iterator[None]:
    """The formula with pictures whose border is repeated up to a multiple of 32, and cut for the smaller tokens."""
    whole = torch.cat([pictures, *[pictures[..., -1:, :]] * 16], 2)
    whole = torch.cat([whole, *[whole[..., -1:]] * 16], 3)
    coarse = {key: value for key, value in tensors.items() if re.search("input_blocks_[78]|middle", key)}
    fine = {key: value for key, value in tensors.items() if key not in coarse}
    with by_formula(base, coarse, whole, 1.0), by_formula(base, fine, pictures, 1.0):
        yield


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_control_lora_is_a_controlnet_with_merged_weights(family: str, folders: Path, tmp_path: Path) -> None:
    """Merged as by ComfyUI, from the keys of the file, and renamed by diffusers; trained, built and converted."""
    base, folder = fresh(folders / family), folders / family
    live, (noisy, pictures) = live_on(base, "control-lora"), shown()
    with torch.no_grad():
        attached = Denoiser(base, live)(noisy, TIMES, PROMPTS, frames_of(pictures))
    file = live.adapter({"method": "control-lora"}).save(tmp_path / "lines.safetensors")
    held = load_file(file)
    assert held.pop("lora_controlnet").numel() == 0
    whole = {key.removeprefix(UNET_PREFIX): v for key, v in ldm_state_dict(base).items() if key.startswith(UNET_PREFIX)}
    whole = {key: value for key, value in whole.items() if not key.startswith("out")}
    for key, value in held.items():
        if key.endswith(".up"):
            name = key.removesuffix("up") + "weight"
            down = held[key.removesuffix("up") + "down"]
            change = torch.mm(value.flatten(start_dim=1), down.flatten(start_dim=1))
            whole[name] = whole[name] + change.reshape(whole[name].shape)
        elif not key.endswith(".down"):
            whole[key] = value
    network = ControlNetModel.from_unet(base.unet)
    state = convert_controlnet_checkpoint(whole, network.config)
    for ours, theirs in (("linear_1", "label_emb.0.0"), ("linear_2", "label_emb.0.2")):  # which diffusers leaves out
        state |= {f"add_embedding.{ours}.{k}": whole[f"{theirs}.{k}"] for k in ("weight", "bias") if family == "sdxl"}
    network.load_state_dict(state)
    wanted = predicted(base, noisy, pictures, network)
    assert (wanted - predicted(base, noisy, pictures, None)).abs().max() > 0.05
    torch.testing.assert_close(attached, wanted, rtol=1e-5, atol=1e-5)
    built = network_in(load_adapter(file)).build(base)
    torch.testing.assert_close(predicted(base, noisy, pictures, built), wanted, rtol=1e-5, atol=1e-5)
    if family == "sdxl":
        return
    with open_weights(folder) as weights:
        done = convert(file, tmp_path / "whole", "controlnet", weights=weights)
    assert done.comparison.same
    theirs = ControlNetModel.from_pretrained(done.path)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(DiffgraftError, match=r"hold new weights, not differences: name the base \(--base\)"):
        convert(file, tmp_path / "again", "controlnet")
    with (
        open_weights(folders / "sdxl") as weights,
        pytest.raises(DiffgraftError, match="does not fit this base: "),
    ):
        convert(file, tmp_path / "again", "controlnet", weights=weights)


def test_whole_weights_in_a_file_are_used_and_kept(folders: Path, tmp_path: Path) -> None:
    """Files of Stability AI have whole biases and norms of the encoder."""
    base = fresh(folders / "sd1")
    file = adapter_on(base, "control-lora").save(tmp_path / "lines.safetensors")
    held = load_file(file)
    held["input_blocks.1.0.in_layers.0.weight"] = torch.full((8,), 3.0)
    held["middle_block.0.in_layers.2.bias"] = torch.full((24,), 2.0)
    save_file(held, tmp_path / "more.safetensors")
    source, (noisy, pictures) = load_adapter(tmp_path / "more.safetensors"), shown()
    wanted = predicted(base, noisy, pictures, network_in(source).build(base))
    plain = predicted(base, noisy, pictures, network_in(load_adapter(file)).build(base))
    assert (wanted - plain).abs().max() > 1e-3
    live = live_on(base, "control-lora", rank=5)
    live.load(source)
    with torch.no_grad():
        found = Denoiser(base, live)(noisy, TIMES, PROMPTS, frames_of(pictures))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    again = live.adapter({}).networks[0].tensors
    assert all(torch.equal(value, again[name]) for name, value in source.networks[0].tensors.items())
    assert again.keys() == source.networks[0].tensors.keys()
    assert base.unet.down_blocks[0].resnets[0].norm1.weight.max() < 3, "the base is as before"


@every
def test_fresh_it_is_the_base_and_disabled_it_is_again(method: str, folders: Path) -> None:
    for family in ("sd1", "sdxl"):
        base = fresh(folders / family)
        before = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
        live = attach(load_recipe("control", {"method": method, **SMALL[method]}), base)
        denoiser, (noisy, pictures) = Denoiser(base, live), shown()
        given = noisy, TIMES, PROMPTS, frames_of(pictures)
        with torch.no_grad():
            steered = denoiser(*given)
            with live.disabled():
                bare = denoiser(*given)
            assert torch.equal(steered, bare)
            for value in live.trainable().values():
                value.add_(0.1)
            assert not torch.allclose(denoiser(*given), bare, atol=1e-3)
            with live.disabled():
                assert torch.equal(denoiser(*given), bare)
            live.detach()
            assert torch.equal(Denoiser(base)(*given), bare)
        assert all(torch.equal(value, before[name]) for name, value in base.denoiser.state_dict().items())


@every
def test_stopped_and_resumed_it_is_never_stopped(
    method: str,
    base: Base,
    drawings: Path,
    tmp_path: Path,
) -> None:
    settings = {**QUICK, **SMALL[method], "method": method, "steps": 3, "lr": 1e-2, "ema": 0.9, "flip": True}
    settings |= {"gradient_checkpointing": True}
    whole = dg.train("control", base=base, images=drawings, output=tmp_path / "whole", **settings)
    with interrupted_after(2):
        dg.train("control", base=base, images=drawings, output=tmp_path / "cut", **settings)
    again = dg.train(base=base, resume=tmp_path / "cut")
    assert again.adapter_file.read_bytes() == whole.adapter_file.read_bytes()
    tensors = load_adapter(whole.adapter_file).networks[0].tensors
    own = "up" if method == "lllite" else "controlnet_mid_block"
    assert max(float(value.abs().max()) for name, value in tensors.items() if own in name) > 1e-3


@every
def test_checkpointed_blocks_are_computed_again_as_they_were(method: str, folders: Path) -> None:
    """Two calls with other pictures, and one without any, before the backward pass; training goes on from a file."""
    base = fresh(folders / "sd1")
    live, (noisy, pictures) = live_on(base, method), shown()
    other = attach(load_recipe("control", {"method": method, "seed": 9, **SMALL[method]}), base)
    other.detach()
    assert other.load(live.adapter({})) == set(live.paths().values())
    other.detach()
    loaded = other.trainable()
    assert all(torch.equal(value, loaded[name]) for name, value in live.trainable().items())

    def gradients() -> list[Tensor]:
        denoiser, total = Denoiser(base, live), torch.zeros(())
        for place, given in enumerate((pictures, 1 - pictures, pictures)):
            with live.disabled() if place == 2 else nullcontext():
                prediction = denoiser(noisy, TIMES, PROMPTS, frames_of(given))
            total = total + (place + 1) * (prediction - 1).square().mean()
        return list(torch.autograd.grad(total, list(live.trainable().values())))

    plain = gradients()
    for network in (base.denoiser, live.control):
        network.enable_gradient_checkpointing(recomputing(network, live))  # type: ignore[union-attr, operator]
        network.train()  # type: ignore[union-attr]
    for again, value in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(again, value, rtol=1e-4, atol=1e-6)
    live.detach()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lllite", {"loss": {"objective": "consistency", "options": {"guidance": 3}}, "gradient_checkpointing": True}),
        ("control-lora", {"precision": "bfloat16" if has_bfloat16() else "float32", "quantize": "int8"}),
    ],
)
def test_objectives_and_options_of_the_loop_go_with_it(
    method: str,
    settings: dict[str, Any],
    drawings: Path,
    tmp_path: Path,
) -> None:
    given = {**QUICK, **SMALL[method], "method": method, "lr": 1e-2, "steps": 3, **settings}
    run = dg.train("control", images=drawings, output=tmp_path / "run", **given)
    assert len({entry["loss"] for entry in run.metrics}) == 3
    assert all(np.isfinite(entry["loss"]) for entry in run.metrics)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@every
def test_on_quantized_and_halved_bases_it_acts_as_its_file(method: str, quantize: str) -> None:
    halved = quantize == "nf4"
    base = load_base("tiny", torch.bfloat16 if halved else torch.float32, quantize=quantize)
    noisy, pictures = normal((2, 4, 6, 9), 3), torch.rand(2, 3, 24, 36, generator=torch.manual_seed(1))
    live = live_on(base, method, quantize=quantize)
    steered = Denoiser(base, live)(noisy, TIMES, PROMPTS, frames_of(pictures))
    steered.square().sum().backward()
    assert all(v.grad is not None and v.grad.abs().max() > 0 for v in live.trainable().values())
    built = network_in(live.adapter({})).build(base)
    live.detach()
    built.to(base.denoiser.dtype)
    bare = predicted(base, noisy, pictures, None).float()
    change = predicted(base, noisy, pictures, built).float() - bare
    assert (steered - bare - change).norm() < (0.1 if halved else 1e-5) * change.norm()


@every
def test_drawing_steers_and_leaves_the_base_alone(method: str, base: Base, short_run: Any, tmp_path: Path) -> None:
    """By strength, the same whatever adapters are in use while it is built, and as told by the pictures' metadata."""
    file = adapter_on(base, method).save(tmp_path / "lines.safetensors")
    before = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    few, condition = DrawSettings(steps=3, size=(64, 48)), drawing(1, (64, 48))

    def pixels(images: list[Any]) -> np.ndarray:
        return np.asarray(images[0]).astype(int)

    with Session(base) as session:
        bare, off = pixels(session.draw("a dog", [1], few)), []
        for strength in (0.0, 0.3, 1.0):
            session.steer(file, ControlInput(condition, "edges", strength))
            off.append(np.abs(pixels(session.draw("a dog", [1], few)) - bare).mean())
        assert off[0] == 0
        assert 0 < off[1] < off[2]
        session.use(short_run.adapter_file, 0.8)
        first = session.draw("a dog", [1], few)
        session.steer(file, ControlInput(condition, "edges"))
        assert np.array_equal(pixels(session.draw("a dog", [1], few)), pixels(first))
    assert all(torch.equal(value, before[name]) for name, value in base.denoiser.state_dict().items())
    assert not any(own._forward_pre_hooks for own in base.denoiser.modules())
    steered = {"control": condition, "control_net": str(file), "control_by": "edges"}
    (drawn,) = dg.generate("a dog", base=base, seed=1, steps=3, size=(64, 48), **steered)
    assert np.array_equal(pixels([drawn]), pixels(session_draw(base, file, condition, few)))
    with pytest.raises(DiffgraftError, match="needs a condition picture: give it as control_net"):
        graft(base, {file: 1.0})


def session_draw(base: Base, file: Path, condition: Any, settings: DrawSettings) -> list[Any]:
    with Session(base) as session:
        session.steer(file, ControlInput(condition, "edges"))
        return session.draw("a dog", [1], settings)


@pytest.mark.parametrize(
    ("method", "changed", "answer"),
    [
        ("lllite", lambda held: {"lllite_unet_out_2.up.0.bias": held.popitem()[1]}, "unknown key lllite_unet_out_2.up"),
        (
            "lllite",
            lambda held: {k: v[:-1] if k.endswith("mid.0.bias") else v for k, v in held.items()},
            "its weights do not fit together",
        ),
        ("lllite", lambda held: {k: v for k, v in held.items() if "down" not in k}, r"down\.0\.weight is missing"),
        (
            "lllite",
            lambda held: {k: v[..., :1, :1] if v.ndim == 4 else v for k, v in held.items()},
            r"it shrinks pictures by 1, and this base by \d+",
        ),
        ("control-lora", lambda held: {k: v for k, v in held.items() if "zero_convs.1" not in k}, "is missing"),
        ("control-lora", lambda held: {k: v for k, v in held.items() if not k.endswith("down")}, "down is missing"),
        (
            "control-lora",
            lambda held: {k: v[:-1] if k.endswith("attn1.to_q.up") else v for k, v in held.items()},
            "the difference at .* is not for a weight of",
        ),
        ("control-lora", lambda held: {**held, "output_blocks.1.0.in_layers.2.bias": torch.ones(3)}, "no such module"),
        ("control-lora", lambda held: {**held, "nonsense.up": torch.ones(3, 2)}, r"unknown key nonsense\.up"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_do_not_fit_are_told(
    method: str, changed: Callable[[dict[str, Tensor]], dict[str, Tensor]], answer: str, folders: Path, tmp_path: Path
) -> None:
    base = fresh(folders / "sd1")
    file = adapter_on(base, method).save(tmp_path / "lines.safetensors")
    save_file({k: v.contiguous() for k, v in changed(load_file(file)).items()}, tmp_path / "other.safetensors")
    with pytest.raises(DiffgraftError, match=answer):
        Session(base).steer(tmp_path / "other.safetensors", ControlInput(drawing(1)))


@every
def test_it_is_refused_where_it_has_no_place(method: str, base: Base, folders: Path, tmp_path: Path) -> None:
    file = adapter_on(fresh(folders / "sdxl"), method).save(tmp_path / "lines.safetensors")
    with pytest.raises(DiffgraftError, match="lines does not fit this base: "):
        Session(fresh(folders / "sd1")).steer(file, ControlInput(drawing(1)))
    other = adapter_on(base, "lllite" if method == "control-lora" else "control-lora")
    live = live_on(base, method)
    with pytest.raises(ValueError, match=rf"it holds 1 networks \(.*\), but exactly one {method} is needed"):
        live.load(other)
    live.detach()
    for settings, reason in (
        ({"alpha": 2.0}, f"alpha is not supported by method={method}"),
        ({"text_encoder": True}, f"text_encoder is not supported by method={method}"),
    ):
        with pytest.raises(DiffgraftError, match=reason):
            load_recipe("control", {"method": method, **settings})
    with pytest.raises(DiffgraftError, match=f"method={method} needs condition pictures"):
        load_recipe("style", {"method": method})


@every
def test_an_estimate_counts_it(method: str) -> None:
    recipe = load_recipe("control", {"method": method, **SMALL[method]})
    live = live_on(load_base("tiny"), method)
    cost = cost_of(recipe, meta_base("tiny"), (64, 48))
    assert cost.trained == cost.stored == sum(value.numel() for value in live.trainable().values())
    bare = cost_of(load_recipe("control", {}), meta_base("tiny"), (64, 48))
    assert cost.training < 0.5 * bare.training
    assert cost.step < (0.7 if method == "lllite" else 1.0) * bare.step


def test_layers_of_a_control_lora_can_be_chosen(base: Base) -> None:
    live = live_on(base, "control-lora", layers="attention")
    names = {name for name in live.adapter({}).networks[0].tensors if name.endswith(".up")}
    assert names
    assert all(".to_" in name for name in names)
    assert sorted(name for name, method in methods().items() if method.needs_conditions) == [
        *("control-lora", "controlnet", "lllite")
    ]
