"""Adapter files of every family, as other tools name and read them."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Spec
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base
from diffgraft.bases.layers import choose_layers, parts_of
from diffgraft.bases.loading import CONFIGS
from diffgraft.bases.shapes import layer_shapes
from diffgraft.bases.unet import unet_arguments
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from tests.conftest import UNETS, fresh
from tests.recipes import ON_PICTURES


def random_lora(base: Base, layers: str) -> Adapter:
    """LoRA of rank 3 on layers of all parts of a base."""
    generator = torch.Generator().manual_seed(2)
    deltas = {}
    for part, module in parts_of(base).items():
        for path in choose_layers(part, module, layers):
            out, width, *kernel = module.get_parameter(f"{path}.weight").shape
            down = 0.3 * torch.randn(3, width, *kernel, generator=generator)
            up = 0.3 * torch.randn(out, 3, *[1] * len(kernel), generator=generator)
            deltas[f"{part}.{path.removeprefix('text_model.')}"] = (low_rank(down, up, 1.5),)
    return Adapter(deltas, {"method": "lora", "base": {"family": base.family.name}})


@torch.no_grad()
def said(base: Base) -> Tensor:
    x = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(1))
    told = unet_arguments(base.condition(["a dog", "a cat"], (64, 128)))
    found: Tensor = base.unet(x, torch.tensor([300, 700]), **told).sample
    return found


@pytest.mark.parametrize("method", ON_PICTURES)
@pytest.mark.parametrize("family", sorted(UNETS))
def test_every_method_trains_and_grafts_on_every_family(
    family: str, method: str, folders: Path, tmp_path: Path
) -> None:
    base = fresh(folders / family)
    chosen = get_method(method)
    options = chosen.read_options({})
    paths = {part: choose_layers(part, module, chosen.layers_under(options)) for part, module in parts_of(base).items()}
    assert all(paths.values()) or "text_encoder" in chosen.unsupported_under(options)
    bare = said(base)
    live = chosen.attach(base, Spec(paths, 2, 2.0, 0, options, trigger="<zorp>", noun="dog"))
    prompts = ["a <zorp>", "a <zorp> dog"]
    x = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(1))
    told = unet_arguments(base.condition(prompts, (64, 128)))
    base.unet(x, torch.tensor([300, 700]), **told).sample.square().mean().backward()
    assert any(value.grad is not None and value.grad.abs().max() > 0 for value in live.trainable().values())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in live.trainable().values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
        told = unet_arguments(base.condition(prompts, (64, 128)))
        wanted = base.unet(x, torch.tensor([300, 700]), **told).sample
    file = live.adapter({"method": method, "trigger": "<zorp>", "base": {"family": family}}).save(
        tmp_path / "a.safetensors"
    )
    live.detach()
    assert torch.equal(said(base), bare)
    with graft(base, {file: 1.0}), torch.no_grad():
        told = unet_arguments(base.condition(prompts, (64, 128)))
        torch.testing.assert_close(base.unet(x, torch.tensor([300, 700]), **told).sample, wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(said(base), bare)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "lycoris", "webui", "peft", "diffgraft"])
@pytest.mark.parametrize(("family", "modules"), [("sd1", 192 + 72), ("sd2", 192 + 23 * 6), ("sdxl", 722 + 72 + 192)])
def test_names_of_the_real_sizes_map_one_to_one(family: str, modules: int, dialect: str, tmp_path: Path) -> None:
    """All linear layers and convolutions of the real configurations, those that kohya's LoRA trains among them."""
    one = (low_rank(torch.ones(1, 1), torch.ones(1, 1)),)
    paths = [
        path for path, shape in layer_shapes(family).items() if len(shape) in (2, 4) and not path.endswith("_embedding")
    ]
    trained = [path for path in paths if _is_trained_by_kohya(path)]
    assert len(trained) == modules
    said = {"method": "lora", "base": {"family": family}}
    adapter = Adapter(dict.fromkeys(paths, one), said)
    file = adapter.save(tmp_path / ("a" if dialect == "peft" else "a.safetensors"), dialect)
    assert load_adapter(file).modules == paths or set(load_adapter(file).modules) == set(paths)
    again = load_adapter(file).save(tmp_path / ("b" if dialect == "peft" else "b.safetensors"), dialect)
    if dialect != "peft":
        assert load_file(again).keys() == load_file(file).keys()
        assert len(load_file(file)) == len(paths) * (2 if dialect in ("diffusers", "diffgraft") else 3)


def _is_trained_by_kohya(path: str) -> bool:
    if path.startswith("unet."):
        return ".attentions." in path and not path.endswith("norm")
    return ".encoder.layers." in path


def test_files_that_count_layers(tmp_path: Path) -> None:
    """All of the layers of the real configuration, in the order of 2022; the middle last."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            json.loads((CONFIGS / "sd1" / "unet" / "config.json").read_text("utf-8"))
        )
    blocks = [f"down_blocks.{level}.attentions.{number}" for level in (0, 1, 2) for number in (0, 1)]
    blocks += [f"up_blocks.{level}.attentions.{number}" for level in (1, 2, 3) for number in (0, 1, 2)]
    names = [f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")] + ["ff.net.0.proj"]
    names += [name.replace("attn1", "attn2") for name in names[:4]]
    paths = [f"{block}.transformer_blocks.0.{name}" for block in [*blocks, "mid_block.attentions.0"] for name in names]
    tensors: dict[str, Tensor] = {"<zorp>": torch.randn(768)}
    for place, path in enumerate(paths):
        out, width = unet.get_submodule(path).weight.shape  # type: ignore[union-attr]
        tensors |= {f"unet:{place}:up": torch.randn(out, 2), f"unet:{place}:down": torch.randn(2, width)}
    for place in range(48):
        tensors |= {
            f"text_encoder:{place}:{leaf}": torch.randn(*side) for leaf, side in (("up", (9, 1)), ("down", (1, 7)))
        }
    header = {
        "unet": '["CrossAttention", "Attention", "GEGLU"]',
        "text_encoder": '["CLIPAttention"]',
        "<zorp>": "<embed>",
    }
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, header)
    found = load_adapter(file)
    assert len(found.modules) == 144 + 48
    for place, path in enumerate(paths):
        (delta,) = found.deltas[f"unet.{path}"]
        wanted = tensors[f"unet:{place}:up"] @ tensors[f"unet:{place}:down"]
        torch.testing.assert_close(delta.apply(torch.zeros_like(wanted), None, 1.0)[0], wanted)
    assert torch.equal(
        found.deltas["text_encoder.encoder.layers.1.self_attn.q_proj"][0].leaves["lora_up"],
        tensors["text_encoder:6:up"],
    )
    assert list(found.tokens) == ["<zorp>"]
    listed = [tensors[f"unet:{place}:{leaf}"] for place in range(144) for leaf in ("up", "down")]
    torch.save(listed, tmp_path / "a.pt")
    old = load_adapter(tmp_path / "a.pt")
    assert all(
        torch.equal(old.deltas[path][0].leaves["lora_up"], found.deltas[path][0].leaves["lora_up"])
        for path in old.modules
    )
    for broken, answer in (
        (
            {**tensors, "unet:144:up": torch.ones(2, 1), "unet:144:down": torch.ones(1, 2)},
            "145 pairs for unet; .*144",
        ),
        ({key: value for key, value in tensors.items() if key != "unet:7:up"}, "it has only the factor down of unet:7"),
        ({**tensors, "more": torch.ones(1)}, "unknown key more: expected"),
    ):
        save_file(broken, file, header)
        with pytest.raises(DiffgraftError, match=answer):
            load_adapter(file)
    for classes in ('["ResnetBlock2D"]', '[{"GEGLU": 1}]'):
        save_file(tensors, file, {**header, "unet": classes})
        with pytest.raises(DiffgraftError, match="supported are only CrossAttention"):
            load_adapter(file)
    with pytest.raises(DiffgraftError, match="no adapter format 'cloneofsimo' to write"):
        found.save(tmp_path / "b.safetensors", format="cloneofsimo")
