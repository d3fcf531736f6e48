"""Files for transformers: names of the original layout and of diffusers, with fused layers, as each tool has them."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.adapters.methods.full import FullDelta
from diffgraft.adapters.methods.loha import HadamardProduct
from diffgraft.adapters.methods.lokr import Kronecker
from diffgraft.adapters.methods.lora import LowRank, low_rank
from diffgraft.adapters.ops.convert import convert
from diffgraft.adapters.ops.glance import glance
from diffgraft.adapters.registry import read_delta
from diffgraft.bases.weights import open_weights
from diffgraft.errors import DiffgraftError
from tests.bases.test_original_layout import LAYOUTS, modules, original_state, places
from tests.flow_bases import flow_pipeline

FAMILIES = list(LAYOUTS)
FUSED = [family for family in FAMILIES if any(len(layer.layers) > 1 for layer in LAYOUTS[family].layers)]
Leaves = Callable[[str, tuple[int, ...]], tuple[dict[str, Tensor], float | None]]
_PIPES: dict[str, Any] = {}


def pipeline(family: str) -> Any:
    """A random pipeline of the family, the same in all tests, which do not change it."""
    if family not in _PIPES:
        _PIPES[family] = flow_pipeline(family)
    return _PIPES[family]


def linear(family: str) -> dict[str, nn.Linear]:
    return {path: m for path, m in pipeline(family).transformer.named_modules() if isinstance(m, nn.Linear)}


def drawn(*sides: int) -> Tensor:
    return 0.2 * torch.randn(*sides, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(3)


@pytest.fixture(autouse=True)
def _same_values_in_every_order_of_tests() -> None:
    GENERATOR.manual_seed(3)


def of_factors(factors: Any) -> Leaves:
    def make(path: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], float]:  # noqa: ARG001
        leaves = factors.init_leaves(shape, 3, GENERATOR)
        return {name: drawn(*leaf.shape) for name, leaf in leaves.items()}, 1.5

    return make


def uneven(path: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], float]:
    """LoRA of ranks and scales that differ between the parts of a fused layer."""
    rank = 1 + len(path) % 2 + 3 * path.endswith(("_k", "k_proj"))
    return {"lora_down": drawn(rank, shape[1]), "lora_up": drawn(shape[0], rank)}, 0.7


def dora(path: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], float]:  # noqa: ARG001
    leaves = {"lora_down": drawn(2, shape[1]), "lora_up": drawn(shape[0], 2)}
    return {**leaves, "dora_scale": drawn(shape[0]).abs() + 0.5}, 1.0


def full(path: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], None]:  # noqa: ARG001
    return {"diff": drawn(*shape), "diff_b": drawn(shape[0])}, None


def ia3(path: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], None]:  # noqa: ARG001
    return {"weight": drawn(shape[0]), "on_input": torch.tensor(0)}, None


def glora(path: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], float]:  # noqa: ARG001
    out, width = shape
    return {"a1": drawn(width, 2), "a2": drawn(2, width), "b1": drawn(out, 2), "b2": drawn(2, width)}, 1.0


def oft(path: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], float]:  # noqa: ARG001
    return {"oft_blocks": drawn(shape[0] // 4, 4, 4)}, 0.0


KINDS: Mapping[str, tuple[str, Leaves]] = {
    "lora": ("lora", of_factors(LowRank())),
    "lora, uneven": ("lora", uneven),
    "dora": ("lora", dora),
    "loha": ("loha", of_factors(HadamardProduct())),
    "lokr": ("lokr", of_factors(Kronecker())),
    "full": ("full", full),
    "ia3": ("ia3", ia3),
    "glora": ("glora", glora),
    "oft": ("oft", oft),
}
"""Name → kind of delta, and function from path and shape of a layer to leaves and alpha"""
WRITTEN: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "kohya": {"fused": ("lora", "lora, uneven", "dora", "loha", "full", "ia3"), "same": tuple(KINDS)},
    "comfyui": {"fused": ("lora", "lora, uneven", "dora", "loha", "full", "ia3"), "same": tuple(KINDS)},
    "diffusers": dict.fromkeys(("fused", "same"), ("lora", "lora, uneven", "dora")),
    "peft": dict.fromkeys(("fused", "same"), ("lora", "lora, uneven", "dora", "loha", "lokr")),
    "diffgraft": dict.fromkeys(("fused", "same"), tuple(KINDS)),
}
"""Dialect → kinds that it holds, for families with fused layers in the original layout and for the others"""


def made(family: str, kind: str, ending: str = "") -> Adapter:
    """An adapter of a kind on all linear layers, or on those whose path has `ending` in it; `full` has norms too."""
    name, leaves = KINDS[kind]
    deltas: dict[str, tuple[Delta, ...]] = {}
    for path, layer in linear(family).items():
        own, alpha = leaves(path, tuple(layer.weight.shape))
        if "oft" in kind and (layer.out_features % 4 or path == "norm_out.linear"):
            continue
        if "diff_b" in own and layer.bias is None:
            del own["diff_b"]
        if ending in path:
            deltas[f"transformer.{path}"] = (read_delta(name, own, alpha),)
    if kind == "full" and not ending:
        for path, module in modules(pipeline(family).transformer).items():
            if module.weight.ndim == 1:
                deltas[f"transformer.{path}"] = (FullDelta({"diff": drawn(len(module.weight))}),)
    return Adapter(deltas, {"method": name, "base": {"family": family}})


def merged(family: str, adapter: Adapter) -> nn.Module:
    """The transformer with an adapter in its weights."""
    network = copy.deepcopy(pipeline(family).transformer)
    with torch.no_grad():
        for path, deltas in adapter.deltas.items():
            module = network.get_submodule(path.removeprefix("transformer."))
            bias = getattr(module, "bias", None)
            weight = module.weight
            for delta in deltas:
                assert delta.fits(tuple(module.weight.shape)), path
                weight, bias = delta.apply(weight, bias, 1.0)
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)
    return network


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def written(adapter: Adapter, folder: Path, dialect: str) -> Path:
    return adapter.save(folder / (dialect if dialect == "peft" else f"{dialect}.safetensors"), dialect)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_and_read_again_exactly_or_refused(family: str, kind: str, tmp_path: Path) -> None:
    adapter = made(family, kind)
    before = merged(family, adapter).state_dict()
    untouched = pipeline(family).transformer.state_dict()
    assert distance(before, untouched) > 0.01
    for dialect, kinds in WRITTEN.items():
        # the factors of (IA)³ do not tell whether a modulation has only the two halves that SD 3 has in another order
        is_open = kind == "ia3" and family == "sd3" and dialect in ("kohya", "comfyui")
        if is_open or kind not in kinds["fused" if family in FUSED else "same"]:
            with pytest.raises(DiffgraftError, match="cannot be written in the format"):
                written(adapter, tmp_path, dialect)
            assert not list(tmp_path.glob(f"{dialect}*"))
            continue
        again = load_adapter(written(adapter, tmp_path, dialect))
        assert again.metadata["base"]["family"] == family
        assert set(again.deltas) == set(adapter.deltas)
        # values change only where scales are multiplied into factors, and biases of ComfyUI's difference by nothing
        assert distance(merged(family, again).state_dict(), before) <= (2e-6 if kind == "lora, uneven" else 1e-6)
        if kind in ("loha", "lokr", "full") and dialect != "peft":
            assert all(
                torch.equal(leaf, again.deltas[path][0].leaves[name])
                for path, (delta,) in adapter.deltas.items()
                for name, leaf in delta.leaves.items()
            )


@pytest.mark.parametrize("family", FUSED)
def test_parts_of_fused_layers_alone(family: str, tmp_path: Path) -> None:
    """A layer that has no delta in the adapter has none when it is read again."""
    endings = ("gate_layer", "mlp.proj") if family == "qwen-image-21" else ("_q", "_v")
    for kind in ("lora", "loha", "full", "ia3"):
        for ending in endings:
            adapter = made(family, kind, ending)
            for dialect in ("kohya", "comfyui"):
                again = load_adapter(written(adapter, tmp_path, dialect))
                assert set(again.deltas) == set(adapter.deltas)
                assert distance(merged(family, again).state_dict(), merged(family, adapter).state_dict()) <= 1e-6
    with pytest.raises(DiffgraftError, match="DoRA, which has norms of all rows, but one of them is not changed"):
        written(made(family, "dora", endings[0]), tmp_path, "kohya")


def patched(family: str, tensors: Mapping[str, Tensor], name_of: Callable[[str], str]) -> dict[str, Tensor]:
    """Original weights with a file's LoRA, LoHa, LoKr and differences added, by ComfyUI's rule (``comfy/lora.py``).

    `name_of` gives the beginning of the keys for an original path.
    """
    state = original_state(LAYOUTS[family], pipeline(family).transformer)
    used = set()
    for key, weight in state.items():
        start, end = name_of(key.rpartition(".")[0]), key.rpartition(".")[2]
        own = {name.removeprefix(f"{start}."): value for name, value in tensors.items() if name.startswith(f"{start}.")}
        if end == "bias":
            state[key] = weight + own["diff_b"] if "diff_b" in own else weight
            continue
        used |= {f"{start}.{name}" for name in own}
        alpha = own.get("alpha")
        if down := own.keys() & {"lora_down.weight", "lora_A.weight"}:
            (down,) = down
            up = own[down.replace("down", "up").replace("_A", "_B")]
            scale = 1.0 if alpha is None else float(alpha) / len(own[down])
            state[key] = weight + scale * up @ own[down]
        elif "hada_w1_a" in own:
            scale = 1.0 if alpha is None else float(alpha) / len(own["hada_w1_b"])
            first, second = (own[f"hada_w{n}_a"] @ own[f"hada_w{n}_b"] for n in (1, 2))
            state[key] = weight + scale * first * second
        elif "lokr_w1" in own:
            w2 = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
            scale = float(alpha) / len(own["lokr_w2_b"]) if alpha is not None and "lokr_w2_b" in own else 1.0
            state[key] = weight + scale * torch.kron(own["lokr_w1"], w2)
        elif own.keys() & {"diff", "w_norm"}:
            state[key] = weight + own.get("diff", own.get("w_norm"))
    assert used == set(tensors), sorted(set(tensors) - used)[:3]
    return state


def kohya_name(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}"


def comfyui_name(path: str) -> str:
    return f"diffusion_model.{path}"


NAME_OF = {"kohya": kohya_name, "comfyui": comfyui_name}


@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_takes_written_files_to_mean_the_same(family: str, tmp_path: Path) -> None:
    for kind in ("lora", "lora, uneven", "loha", "full", *(() if family in FUSED else ("lokr",))):
        adapter = made(family, kind)
        wanted = original_state(LAYOUTS[family], merged(family, adapter))
        for dialect, name_of in NAME_OF.items():
            found = patched(family, load_file(written(adapter, tmp_path, dialect)), name_of)
            assert distance(found, wanted) <= 2e-6


def original_modules(family: str, kind: str) -> dict[str, dict[str, Tensor]]:
    """Original path of each layer → leaves of a kind, as a tool trains them that has the original layout."""
    state = original_state(LAYOUTS[family], pipeline(family).transformer)
    factors = {"lora": LowRank(), "loha": HadamardProduct(), "lokr": Kronecker(), "lokr of few": Kronecker()}[kind]
    leaves: dict[str, dict[str, Tensor]] = {}
    for key, weight in state.items():
        path, _, end = key.rpartition(".")
        if end == "weight" and weight.ndim == 2 and "token" not in key:
            if kind == "lokr of few":  # as ai-toolkit's with factor=4, in which a row of blocks spans two parts
                rows = 2 if weight.shape[0] % 4 else 4
                rows = rows if weight.shape[0] % rows == 0 else 1
                own = {"lokr_w1": drawn(rows, 1), "lokr_w2": drawn(weight.shape[0] // rows, weight.shape[1])}
            else:
                zeros = factors.init_leaves(tuple(weight.shape), 3, GENERATOR)
                own = {name: drawn(*leaf.shape) for name, leaf in zeros.items()}
            leaves[path] = own
    return leaves


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr of few"])
def test_fused_layers_of_other_tools_are_split_exactly(family: str, kind: str, tmp_path: Path) -> None:
    """Files with one LoRA, LoHa or LoKr for a fused layer do what ComfyUI does with them."""
    for name_of in (kohya_name, comfyui_name):
        tensors = {}
        for path, leaves in original_modules(family, kind).items():
            for name, leaf in leaves.items():
                tensors[f"{name_of(path)}.{name}{'.weight' if kind == 'lora' else ''}"] = leaf
            tensors[f"{name_of(path)}.alpha"] = torch.tensor(1.5)
        save_file(tensors, tmp_path / "theirs.safetensors")
        adapter = load_adapter(tmp_path / "theirs.safetensors")
        assert adapter.metadata["base"]["family"] == family
        found = original_state(LAYOUTS[family], merged(family, adapter))
        assert distance(found, patched(family, tensors, name_of)) <= 2e-6
        # and back into the same file: the fused factors are found again
        for dialect in ("kohya", "comfyui"):
            again = load_file(written(adapter, tmp_path, dialect))
            assert distance(patched(family, again, NAME_OF[dialect]), found) <= 2e-6
            sizes = [sum(value.numel() for value in held.values() if value.ndim) for held in (again, tensors)]
            assert sizes[0] == sizes[1]


NAMES: Mapping[str, Callable[[str, str, str], str]] = {
    "ai-toolkit": lambda original, ours, number: f"diffusion_model.{original}",  # noqa: ARG005
    "original after transformer": lambda original, ours, number: f"transformer.{original}",  # noqa: ARG005
    "original alone": lambda original, ours, number: original,  # noqa: ARG005
    "peft's prefix, original": lambda original, ours, number: f"base_model.model.{original}",  # noqa: ARG005
    "sd-scripts": lambda original, ours, number: kohya_name(original),  # noqa: ARG005
    "OneTrainer, OMI": lambda original, ours, number: f"transformer.{original}{number}",  # noqa: ARG005
    "OneTrainer": lambda original, ours, number: f"lora_transformer_{ours.replace('.', '_')}",  # noqa: ARG005
    "OneTrainer, dots": lambda original, ours, number: f"lora_transformer.{ours}",  # noqa: ARG005
    "musubi-tuner": lambda original, ours, number: kohya_name(ours),  # noqa: ARG005
    "musubi-tuner, other": lambda original, ours, number: f"diffusion_model.{ours}",  # noqa: ARG005
    "SimpleTuner": lambda original, ours, number: f"lycoris_{ours.replace('.', '_')}",  # noqa: ARG005
    "peft's prefix": lambda original, ours, number: f"base_model.model.{ours}",  # noqa: ARG005
}
"""Tool → name of a module from its original path, its path in diffusers, and the number of its part with a dot"""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tool", NAMES)
def test_names_of_each_tool(family: str, tool: str, tmp_path: Path) -> None:
    """The same LoRA under all names: with one ``down`` for the parts of a fused layer, so that it can be fused."""
    places_of = places(LAYOUTS[family], pipeline(family).transformer)
    downs: dict[str, Tensor] = {}
    fused: dict[str, dict[int, Tensor]] = {}
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in linear(family).items():
        original, part = places_of[path]
        down = downs.setdefault(original.path, drawn(2, layer.in_features))
        parts[path] = (down, drawn(layer.out_features, 2))
        fused.setdefault(original.path, {})[part] = parts[path][1]
    wanted = Adapter({f"transformer.{path}": (low_rank(*pair, 1.0),) for path, pair in parts.items()})
    ends = ("lora_A", "lora_B") if tool in ("ai-toolkit", "peft's prefix") else ("lora_down", "lora_up")
    tensors: dict[str, Tensor] = {}
    for path, (down, up) in parts.items():
        layer, part = places_of[path]
        number = f".{part}" if len(layer.layers) > 1 else ""
        name = NAMES[tool](layer.path, path, number)
        whole = name == NAMES[tool](layer.path, "", "") and len(layer.layers) > 1
        up = torch.cat([fused[layer.path][place] for place in range(len(layer.layers))]) if whole else up
        is_original = layer.path in name or layer.path.replace(".", "_") in name
        if layer.swapped and is_original and up.shape[0] == 2 * down.shape[1]:
            up = torch.cat(up.chunk(2)[::-1])
        without_alpha = "lora_A" in ends
        tensors[f"{name}.{ends[0]}.weight"] = down.clone()
        tensors[f"{name}.{ends[1]}.weight"] = (0.5 if without_alpha else 1) * up
        if not without_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "theirs.safetensors")
    found = load_adapter(tmp_path / "theirs.safetensors")
    assert set(found.deltas) == set(wanted.deltas)
    assert distance(merged(family, found).state_dict(), merged(family, wanted).state_dict()) <= 1e-6


FUSED_KINDS: Mapping[str, tuple[str, Leaves]] = {
    "dora": ("lora", dora),
    "full": ("full", full),
    "glora": ("glora", glora),
    "ia3": ("ia3", ia3),
    "ia3 on inputs": ("ia3", lambda path, shape: ({"weight": drawn(shape[1]), "on_input": torch.tensor(1)}, None)),  # noqa: ARG005
    "dora by inputs": (
        "lora",
        lambda path, shape: ({**dora(path, shape)[0], "dora_scale": drawn(1, shape[1]).abs() + 0.5}, 1.0),
    ),
    "dora of lokr": (
        "lokr",
        lambda path, shape: (  # noqa: ARG005
            {"lokr_w1": drawn(1, 1), "lokr_w2": drawn(*shape), "dora_scale": drawn(shape[0], 1).abs() + 0.5},
            1.0,
        ),
    ),
    "oft": ("oft", oft),
}
"""Name → kind and leaves of a delta of a fused layer, which other tools train"""


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("name", FUSED_KINDS)
def test_other_kinds_on_fused_layers(family: str, name: str, tmp_path: Path) -> None:
    """A delta does to the parts what it does to the fused layer, or the file is refused with what to do."""
    kind, leaves = FUSED_KINDS[name]
    state = original_state(LAYOUTS[family], pipeline(family).transformer)
    layers = {layer.path for layer, _ in places(LAYOUTS[family], pipeline(family).transformer).values()}
    fused = [f"{path}.weight" for path in layers if path.endswith((".qkv", ".linear1", ".gate_up"))]
    tensors: dict[str, Tensor] = {}
    for key in fused:
        own, alpha = leaves(key, tuple(state[key].shape))
        bias = key.replace("weight", "bias")
        if bias not in state:
            own.pop("diff_b", None)
        weight, changed = read_delta(kind, own, alpha).apply(state[key], state.get(bias), 1.0)
        state[key] = weight
        if changed is not None:
            state[bias] = changed
        start = kohya_name(key.removesuffix(".weight"))
        ending = {name: ".weight" if name.startswith(("lora", "a1", "a2", "b1", "b2")) else "" for name in own}
        tensors |= {f"{start}.{leaf}{ending[leaf]}": value for leaf, value in own.items()}
        tensors |= {} if alpha is None else {f"{start}.alpha": torch.tensor(alpha)}
    if name == "dora":
        tensors = {k: v.view(-1, 1) if k.endswith("dora_scale") else v for k, v in tensors.items()}
    file = tmp_path / "theirs.safetensors"
    save_file(tensors, file)
    if kind in ("ia3", "oft") and family.startswith("flux"):  # two generations with the same names and other shapes
        with pytest.raises(DiffgraftError, match="several families have layers with the names of its modules"):
            load_adapter(file)
        save_file(tensors, file, {"diffgraft": json.dumps({"base": {"family": family}})})
    if name in ("dora by inputs", "dora of lokr", "oft"):
        with pytest.raises(DiffgraftError, match=r"layers in diffusers, and what .* cannot be divided .* convert it"):
            load_adapter(file)
        return
    adapter = load_adapter(file)
    assert distance(original_state(LAYOUTS[family], merged(family, adapter)), state) <= 1e-5
    again = load_adapter(written(adapter, tmp_path, "kohya"))
    assert distance(original_state(LAYOUTS[family], merged(family, again)), state) <= 1e-5


def test_blocks_as_sd_scripts_writes_them_become_small_loras(tmp_path: Path) -> None:
    """A block-diagonal LoRA is split into its blocks, with the scale that it had, and joined to the same tensors."""
    rank, rows, width = 4, 32, 32
    down, ups = drawn(3 * rank, width), [drawn(rows, rank) for _ in range(3)]
    start = "lora_unet_double_blocks_0_txt_attn_qkv"
    tensors = {
        f"{start}.lora_down.weight": down,
        f"{start}.lora_up.weight": torch.block_diag(*ups),  # type: ignore[no-untyped-call]
        f"{start}.alpha": torch.tensor(3.0),
        "lora_unet_single_blocks_0_linear2.lora_down.weight": drawn(2, 5 * width),
        "lora_unet_single_blocks_0_linear2.lora_up.weight": drawn(rows, 2),
        "lora_unet_single_blocks_0_linear2.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "theirs.safetensors")
    adapter = load_adapter(tmp_path / "theirs.safetensors")
    for place, name in enumerate(("add_q_proj", "add_k_proj", "add_v_proj")):
        (delta,) = adapter.deltas[f"transformer.transformer_blocks.0.attn.{name}"]
        assert torch.equal(delta.leaves["lora_up"], ups[place])
        assert torch.equal(delta.leaves["lora_down"], down[rank * place : rank * (place + 1)])
        assert delta.alpha == 1.0
    again = load_file(written(adapter, tmp_path, "kohya"))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in again.items())


def test_unknown_and_damaged_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    good = {f"lora_unet_double_blocks_0_img_attn_qkv.lora_{side}.weight": drawn(4, 4) for side in ("down", "up")}
    good = {key: drawn(2, 8) if "down" in key else drawn(24, 2) for key in good}
    other = "lora_unet_double_blocks_3_img_attn_qvk"
    cases = {
        "module double_blocks_3_img_attn_qvk, which flux1 does not have.*did you mean 'double_blocks_3_img_attn_qkv'": {
            **good,
            f"{other}.lora_down.weight": drawn(2, 8),
            f"{other}.lora_up.weight": drawn(24, 2),
        },
        r"unknown key lora_unet_double_blocks_0_img_attn_qkv\.lora_mild": {
            **good,
            "lora_unet_double_blocks_0_img_attn_qkv.lora_mild": drawn(1),
        },
        "its diff_b has 25 rows instead of 24: convert it": {
            "lora_unet_double_blocks_0_img_attn_qkv.diff": drawn(24, 8),
            "lora_unet_double_blocks_0_img_attn_qkv.diff_b": drawn(25),
        },
        "has 25 rows, which are not divisible by 3": {**good, next(key for key in good if "up" in key): drawn(25, 2)},
        "several families have layers with the names of its modules, such as time_in_in_layer": {
            "lora_unet_time_in_in_layer.lora_down.weight": drawn(2, 8),
            "lora_unet_time_in_in_layer.lora_up.weight": drawn(8, 2),
        },
        "those of none of flux1, flux2-klein: convert": {
            "lora_unet_single_blocks_0_linear1.lora_down.weight": drawn(2, 8),
            "lora_unet_single_blocks_0_linear1.lora_up.weight": drawn(80, 2),
        },
    }
    for message, tensors in cases.items():
        save_file(tensors, tmp_path / "theirs.safetensors")
        with pytest.raises(DiffgraftError, match=message):
            load_adapter(tmp_path / "theirs.safetensors")


def test_a_fused_layer_that_is_also_stored_in_parts_counts_once(tmp_path: Path) -> None:
    """As trainers of Z-Image write them, for programs that know only one of the layouts."""
    down, up = drawn(2, 32), drawn(96, 2)
    names = {
        "attention.qkv": up,
        **{f"attention.to_{letter}": part for letter, part in zip("qkv", up.chunk(3), strict=True)},
    }
    tensors = {f"diffusion_model.layers.0.{name}.lora_up.weight": value.clone() for name, value in names.items()}
    tensors |= {f"diffusion_model.layers.0.{name}.lora_down.weight": down.clone() for name in names}
    save_file(tensors, tmp_path / "theirs.safetensors")
    adapter = load_adapter(tmp_path / "theirs.safetensors")
    for letter, part in zip("qkv", up.chunk(3), strict=True):
        (delta,) = adapter.deltas[f"transformer.layers.0.attention.to_{letter}"]
        assert torch.equal(delta.leaves["lora_up"], part)


def test_the_name_that_peft_gives_an_adapter_is_no_part_of_the_path(tmp_path: Path) -> None:
    """musubi-tuner writes it on request; in diffusers' layout, the alpha in the header still counts."""
    down, up = drawn(2, 32), drawn(96, 2)
    start = "diffusion_model.layers.0.attention.qkv"
    named = {f"{start}.lora_A.default.weight": down, f"{start}.lora_B.default.weight": up}
    save_file(named, tmp_path / "a.safetensors")
    paths = [f"transformer.layers.0.attention.to_{letter}" for letter in "qkv"]
    assert list(load_adapter(tmp_path / "a.safetensors").deltas) == paths
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6})}
    start = "transformer.layers.0.attention.to_out.0"
    named = {f"{start}.lora_A.default.weight": down, f"{start}.lora_B.default.weight": up[:32]}
    save_file(named, tmp_path / "b.safetensors", header)
    ((delta,),) = load_adapter(tmp_path / "b.safetensors").deltas.values()
    assert delta.alpha == 6


def test_several_deltas_of_a_layer_are_joined_before_its_parts_are(tmp_path: Path) -> None:
    """LoRAs of one layer are added up, and the difference of a bias beside them stays one."""
    deltas: dict[str, tuple[Delta, ...]] = {}
    for letter in "qk":
        loras = [low_rank(drawn(rank, 32), drawn(32, rank), 1.0) for rank in (1, 2)]
        deltas[f"transformer.transformer_blocks.0.attn.to_{letter}"] = (*loras, FullDelta({"diff_b": drawn(32)}))
    adapter = Adapter(deltas, {"base": {"family": "flux1"}})
    for dialect in ("kohya", "comfyui"):
        again = load_adapter(written(adapter, tmp_path, dialect))
        assert set(again.deltas) == set(deltas)
        assert all(sorted(delta.kind for delta in own) == ["full", "lora"] for own in again.deltas.values())
        assert distance(merged("flux1", again).state_dict(), merged("flux1", adapter).state_dict()) <= 1e-6


def test_text_encoders_have_the_numbers_of_sd_scripts(tmp_path: Path) -> None:
    """T5 is the third text encoder in names, also for FLUX.1, where it is the second of the pipeline."""
    clip, t5 = "encoder.layers.0.self_attn.q_proj", "encoder.block.0.layer.1.DenseReluDense.wi_0"
    lora = (low_rank(drawn(2, 8), drawn(8, 2), 1.0),)
    for family, second, third in (("sd3", f"text_encoder_2.{clip}", "text_encoder_3"), ("flux1", "", "text_encoder_2")):
        paths = ["transformer.transformer_blocks.0.attn.to_out.0", f"text_encoder.{clip}", second, f"{third}.{t5}"]
        adapter = Adapter({path: lora for path in paths if path}, {"base": {"family": family}})
        file = written(adapter, tmp_path, "kohya")
        wanted = {"lora_unet", "lora_te1", "lora_te3"} | ({"lora_te2"} if second else set())
        assert {key[: key.index("_", 5)] for key in load_file(file)} == wanted
        assert set(load_adapter(file).deltas) == set(adapter.deltas)
        without_t5 = Adapter({path: lora for path in paths[:3] if path}, {"base": {"family": family}})
        assert set(load_adapter(written(without_t5, tmp_path, "comfyui")).deltas) == set(without_t5.deltas)
        with pytest.raises(DiffgraftError, match="which has no name in such files"):
            written(adapter, tmp_path, "comfyui")


def test_conversion_takes_the_family_from_the_base_and_approximates_on_request(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    pipeline("sd3").save_pretrained(folder)
    known = made("sd3", "lokr", "attn.to_")
    adapter = Adapter(known.deltas, {"method": "lokr"})
    source = written(adapter, tmp_path, "diffgraft")
    with pytest.raises(DiffgraftError, match=r"may be for flux1, .*sd3: name the base \(--base\)"):
        convert(source, tmp_path / "a.safetensors", "kohya")
    with open_weights(folder) as weights:
        with pytest.raises(DiffgraftError, match=r"LoKr with different factors.*Use --rank or --energy"):
            convert(source, tmp_path / "a.safetensors", "kohya", weights=weights)
        rough, fine = (
            convert(source, tmp_path / f"{rank}.safetensors", "kohya", RankBudget(rank), weights) for rank in (2, 24)
        )
    assert rough.approximated
    assert fine.comparison.worst[1] < 1e-4 < 0.05 < rough.comparison.worst[1] < 1
    assert load_adapter(rough.path).metadata["base"]["family"] == "sd3"
    assert not (tmp_path / "a.safetensors").exists()
    flux = convert(made("flux1", "lokr"), tmp_path / "flux.safetensors", "comfyui", RankBudget(2))
    assert flux.approximated
    assert 0.05 < flux.comparison.worst[1] < 1
    plain = made("sd3", "lora", "attn.to_")
    exact = convert(Adapter(plain.deltas, plain.metadata), tmp_path / "exact.safetensors", "comfyui")
    assert not exact.approximated
    assert exact.comparison.worst[1] == 0


def test_attentions_alone_tell_the_family_by_the_size_of_published_bases(tmp_path: Path) -> None:
    for width, blocks, family in ((1536, 24, "sd3"), (2432, 38, "sd3"), (3072, 19, "flux1"), (3072, 60, "qwen-image")):
        paths = [f"transformer.transformer_blocks.{place}.attn.to_q" for place in range(blocks)]
        adapter = Adapter({path: (low_rank(drawn(1, width), drawn(width, 1)),) for path in paths})
        again = load_adapter(written(adapter, tmp_path, "diffusers"))
        assert again.metadata["base"]["family"] == family
        if family != "qwen-image":
            assert "_qkv.alpha" in str(load_file(written(again, tmp_path, "kohya")).keys())
        few = Adapter(dict(list(adapter.deltas.items())[:-1]))
        assert "base" not in load_adapter(written(few, tmp_path, "diffusers")).metadata


def test_layers_are_counted_as_they_are_in_diffusers(tmp_path: Path) -> None:
    """The header alone does not show how many layers a fused one is, so that `inspect` reads the file."""
    adapter = made("flux1", "lora")
    assert glance(written(adapter, tmp_path, "kohya")) is glance(written(adapter, tmp_path, "comfyui")) is None
    lines = glance(written(adapter, tmp_path, "diffusers"))
    assert lines is not None
    assert f"modules  {len(adapter.deltas)} in transformer" in lines


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_is_saved_as_diffusers_has_it(family: str, tmp_path: Path) -> None:
    """Without a format, a LoRA has the layout of diffusers, and other kinds the project's own, which fuses nothing."""
    lora = load_file(made(family, "lora").save(tmp_path / "lora.safetensors"))
    assert all(key.startswith("transformer.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in lora)
    loha = load_file(made(family, "loha").save(tmp_path / "loha.safetensors"))
    assert all(key.startswith("transformer.") and ".0.hada_" in key for key in loha)
    with pytest.raises(DiffgraftError, match="webui does not draw with"):
        written(made(family, "lora"), tmp_path, "webui")
