"""Round trips of every kind of adapter through every format: ``python -m benchmarks.formats`` writes the page.

An adapter of every kind, with layers of every shape, is saved in every format, read again and compared.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.factors import Factors
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.formats.header import with_rank_schedule
from diffgraft.adapters.formats.original_names import layouts, read_layers
from diffgraft.adapters.method import Spec
from diffgraft.adapters.methods.hypernetwork import HypernetworkOptions
from diffgraft.adapters.methods.loha import HadamardProduct
from diffgraft.adapters.methods.lokr import Kronecker
from diffgraft.adapters.methods.lora import LowRank
from diffgraft.adapters.ops.compare import compare
from diffgraft.adapters.registry import get_method, read_delta, read_network, written_dialects
from diffgraft.bases import load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.bases.shapes import layer_shapes
from diffgraft.errors import DiffgraftError
from diffgraft.files import write_text

PAGE = Path(__file__).parent / "results" / "formats.md"
HEAD = """# Which adapters fit into which format

`python -m benchmarks.formats` wrote this page. For each kind of adapter and each format: **↔** means that it is written
and read again bit for bit. – means that the format cannot hold it: `diffgraft convert` stops and says why, or, with
`--rank` or `--energy`, approximates it by LoRAs (and also needs `--base` if it depends on the base's weights).

`kohya` and `lycoris` use the same key names; `kohya` adds the header that sd-scripts writes and webui reads. `comfyui`
has ai-toolkit's names, and is only written for transformers, as ComfyUI reads kohya's names for all others. `webui`
contains only what stable-diffusion-webui *and* ComfyUI read with the same meaning. `peft` is a folder with a subfolder
for each part of the base, `custom-diffusion` one with a file for each word; it holds new weights, so `convert` needs
`--base` for differences. `controlnet` is diffusers' ControlNets, `control-lora` and `lllite` are those of Stability AI
and of kohya, `aesthetic` webui's aesthetic embeddings. `diffgraft` is this project's own layout, described in
`adapters/formats/native.py`. `convert --to controlnet --base BASE` also writes a Control-LoRA, as a whole ControlNet.

"""
TRANSFORMERS = """
## Transformers

The same for layers of FLUX.1, of which `kohya`, `lycoris` and `comfyui` join queries, keys and values to one layer, and
in single blocks also the feed-forward layer. The layers here have factors of their own, as diffgraft trains them; a
LoRA or LoHa is joined to one of the sum of their ranks. The rows *of a fused layer* are files of other tools with one
delta for such a layer, read and written again: a LoKr becomes a sum of several LoKr, and one again. FLUX.2, SD 3 and
Z-Image are like FLUX.1. In Qwen-Image no layers are joined, so that these files hold whatever those of a UNet hold.

"""
TAIL = """
## Files of other tools

Files of other tools that can be read. `diffgraft convert` writes them in any of the formats above that can hold them:

| files | contents | keys such as |
|-|-|-|
| diffusers: older names, also mixed with current ones as its scripts write them | LoRA, DoRA | `….to_q.lora.down.weight`, `….attn1.processor.to_q_lora.down.weight` |
| peft, LyCORIS, kohya, webui, ComfyUI, ai-toolkit | everything in the tables above | with block names of diffusers or of the original layout |
| OneTrainer, musubi-tuner, SimpleTuner, for transformers | everything in the tables above | `lora_transformer_….lora_down.weight`, `transformer.….qkv.0.lora_down.weight`, `diffusion_model.transformer_blocks.…`, `lycoris_…` |
| LyCORIS on modules of any type | everything in the table above | `lycoris_….lora_down.weight` |
| kohya's OFT | OFT with a bounded norm | `oft_unet_….oft_blocks` |
| cloneofsimo, `.safetensors` and `.pt` | LoRA, with words | `unet:0:up`, `<word>` |
| Custom Diffusion of diffusers, a file or a folder | new weights, with words | `….processor.to_k_custom_diffusion.weight` |
| webui's and kohya's words, `.pt` and `.safetensors` | textual inversion | `string_to_param.*`, `emb_params` |
| webui's hypernetworks, `.pt` | hypernetwork | `768` |
| webui's aesthetic embeddings, `.pt` | aesthetic embedding; to draw with it, add the [projection](../../docs/aesthetic.md) of a CLIP | one row of 768 numbers |
| GLoRA from before May 2024 | GLoRA | as today; the factors are distinguished by their shapes |

At strength 1, a DoRA is the same in every format. At other strengths LyCORIS, peft and webui differ; diffgraft computes
a DoRA as the tool that wrote the file, which `diffgraft inspect` names. ComfyUI squares the strength of OFT and BOFT.
"""  # noqa: E501
LAYERS = (
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.down_blocks.0.attentions.1.proj_in",
    "unet.up_blocks.1.resnets.0.conv1",
    "text_encoder.encoder.layers.3.mlp.fc1",
)
FLUX_LAYERS = {
    **{f"double_blocks_0_{side}_attn_qkv": (144, 48) for side in ("img", "txt")},
    "double_blocks_0_img_mlp_0": (192, 48),
    "single_blocks_0_linear1": (336, 48),
    "single_blocks_0_linear2": (48, 240),
    "final_layer_adaLN_modulation_1": (96, 48),
}
"""Original name of a layer of FLUX.1, an eightieth as wide → shape of its weight"""
_FACTORS: dict[str, tuple[str, Factors]] = {
    "lora, locon": ("lora", LowRank()),
    "locon, Tucker": ("lora", LowRank(True)),
    "loha": ("loha", HadamardProduct()),
    "loha, Tucker": ("loha", HadamardProduct(True)),
    "lokr": ("lokr", Kronecker()),
}


def samples() -> dict[str, Adapter]:
    """Return the name of each kind → an adapter of that kind, on layers of Stable Diffusion 1.5."""
    shapes = {path: layer_shapes("sd1")[path] for path in LAYERS}
    generator = torch.Generator().manual_seed(1)

    def drawn(*sides: int) -> Tensor:
        return 0.1 * torch.randn(*sides, generator=generator)

    def on_all(kind: str, leaves: Mapping[str, Mapping[str, Tensor]], alpha: float | None) -> Adapter:
        deltas: dict[str, tuple[Delta, ...]] = {p: (read_delta(kind, values, alpha),) for p, values in leaves.items()}
        return Adapter(deltas, {"method": kind, "base": {"family": "sd1"}})

    adapters: dict[str, Adapter] = {}
    for name, (kind, factors) in _FACTORS.items():
        leaves = {path: factors.init_leaves(shape, 2, generator) for path, shape in shapes.items()}
        filled = {path: {key: drawn(*leaf.shape) for key, leaf in own.items()} for path, own in leaves.items()}
        adapters[name] = on_all(kind, filled, 1.0)
        if "Tucker" not in name:
            for side, axis in (("outputs", 0), ("inputs", 1)):
                dora = {
                    path: {**own, "dora_scale": _row(drawn(shapes[path][axis]).abs() + 0.1, axis, len(shapes[path]))}
                    for path, own in filled.items()
                }
                adapters[f"{name}, DoRA by {side}"] = on_all(kind, dora, 1.0)
    timed = replace(
        adapters["lora, locon"], metadata={"method": "tlora", "rank_schedule": {}, "base": {"family": "sd1"}}
    )
    adapters["tlora"] = with_rank_schedule(timed)
    adapters["full"] = on_all("full", {p: {"diff": drawn(*s), "diff_b": drawn(s[0])} for p, s in shapes.items()}, None)
    norm = {"unet.conv_norm_out": {"diff": drawn(320), "diff_b": drawn(320)}}
    adapters["full, of norms"] = on_all("full", norm, None)
    ones = {path: {"weight": drawn(shape[0]), "on_input": torch.tensor(0)} for path, shape in shapes.items()}
    adapters["ia3"] = on_all("ia3", ones, None)
    adapters["glora"] = on_all("glora", {p: _glora(s, drawn) for p, s in shapes.items() if len(s) == 2}, 1.0)
    adapters["oft"] = on_all("oft", {p: {"oft_blocks": drawn(s[0] // 8, 8, 8)} for p, s in shapes.items()}, 0.0)
    adapters["boft"] = on_all("boft", {p: {"oft_blocks": drawn(2, s[0] // 8, 8, 8)} for p, s in shapes.items()}, 0.0)
    words = {"<zorp>": {"text_encoder": drawn(2, 768)}}
    adapters["textual inversion"] = Adapter({}, {"method": "textual-inversion", "trigger": "<zorp>"}, tokens=words)
    both = {"<zorp>": {"text_encoder": drawn(2, 768), "text_encoder_2": drawn(2, 1280)}}
    adapters["textual inversion, XL"] = Adapter({}, {"method": "textual-inversion", "trigger": "<zorp>"}, tokens=both)
    adapters["pivotal"] = Adapter(adapters["lora, locon"].deltas, {"method": "pivotal"}, tokens=words)
    keys = {path: drawn(*shapes[path]) for path in LAYERS[:1]}
    custom = on_all("full", {path: {"diff": value} for path, value in keys.items()}, None)
    adapters["custom"] = replace(custom, metadata={**custom.metadata, "method": "custom"}, tokens=words)
    new = on_all("replacement", {path: {"weight": value} for path, value in keys.items()}, None)
    adapters["custom, new weights"] = replace(new, metadata={**new.metadata, "method": "custom"}, tokens=words)
    adapters["hypernetwork"] = _hypernetwork(drawn)
    adapters["controlnet"] = _control_network()
    adapters["lllite"], adapters["control lora"] = _small_control("lllite"), _small_control("control-lora")
    embedding = read_network("aesthetic", {"embedding": drawn(1, 768)}, {})
    adapters["aesthetic embedding"] = Adapter({}, {"method": "aesthetic"}, (embedding,))
    return adapters


def _row(norms: Tensor, axis: int, axes: int) -> Tensor:
    sides = [1] * axes
    sides[axis] = -1
    return norms.view(sides)


def _glora(shape: tuple[int, ...], drawn: Callable[..., Tensor]) -> dict[str, Tensor]:
    out, width = shape
    return {"a1": drawn(width, 2), "a2": drawn(2, width), "b1": drawn(out, 2), "b2": drawn(2, width)}


def _hypernetwork(drawn: Callable[..., Tensor]) -> Adapter:
    settings = HypernetworkOptions.model_validate({})
    tensors: dict[str, Tensor] = {}
    for width in (320, 768):
        for side in "kv":
            tensors |= {
                f"{width}-{side}.linear.0.weight": drawn(2 * width, width),
                f"{width}-{side}.linear.0.bias": drawn(2 * width),
                f"{width}-{side}.linear.1.weight": drawn(width, 2 * width),
                f"{width}-{side}.linear.1.bias": drawn(width),
            }
    network = read_network("hypernetwork", tensors, settings.model_dump())
    return Adapter({}, {"method": "hypernetwork"}, (network,))


def _control_network() -> Adapter:
    base = load_base("tiny")
    network = base.family.control_network(base)
    read = read_network("controlnet", network.state_dict(), base.family.control_settings(network))
    return Adapter({}, {"method": "controlnet"}, (read,))


def _small_control(name: str) -> Adapter:
    """Return a new adapter of a method on the embedded base, with the layers per block by which its file is read."""
    base, method = load_base("tiny"), get_method(name)
    part = base.family.denoiser
    paths = {part: choose_layers(part, base.denoiser, "attention", base.family)}
    live = method.attach(base, Spec(paths, 2, 2.0, 1, method.read_options({})))
    live.detach()
    return live.adapter({"method": name, "base": {"family": base.family.name, **base.family.header(base)}})


def transformer_samples() -> dict[str, Adapter]:
    """Return the name of each kind → an adapter of that kind, on layers of FLUX.1 with their own factors, or fused."""
    generator = torch.Generator().manual_seed(2)

    def drawn(*sides: int) -> Tensor:
        return 0.1 * torch.randn(*sides, generator=generator)

    def leaves_of(kind: str, factors: Factors | None, shape: tuple[int, ...]) -> dict[str, Tensor]:
        if factors is not None:
            zeros = factors.init_leaves(shape, 2, generator)
            return {name: drawn(*leaf.shape) for name, leaf in zeros.items()}
        return {
            "full": lambda: {"diff": drawn(*shape), "diff_b": drawn(shape[0])},
            "ia3": lambda: {"weight": drawn(shape[0]), "on_input": torch.tensor(0)},
            "glora": lambda: _glora(shape, drawn),
            "oft": lambda: {"oft_blocks": drawn(shape[0] // 8, 8, 8)},
        }[kind]()

    kinds = {kind: (kind, factors) for name, (kind, factors) in _FACTORS.items() if "Tucker" not in name}
    kinds |= {kind: (kind, None) for kind in ("full", "ia3", "glora", "oft")}
    adapters: dict[str, Adapter] = {}
    for name, (kind, factors) in kinds.items():
        alpha = None if kind in ("full", "ia3") else 0.0 if kind == "oft" else 1.0
        fused = {path: (read_delta(kind, leaves_of(kind, factors, s), alpha),) for path, s in FLUX_LAYERS.items()}
        own: dict[str, tuple[Delta, ...]] = {}
        for path, shape in FLUX_LAYERS.items():
            named = layouts()["flux1"].find(path)
            assert named is not None
            for layer, (start, stop) in zip(named.layer.layers, named.layer.bounds(shape[0]), strict=True):
                leaves = leaves_of(kind, factors, (stop - start, shape[1]))
                own[f"transformer.{layer}"] = (read_delta(kind, leaves, alpha),)
        metadata = {"method": kind, "base": {"family": "flux1"}}
        adapters[name] = Adapter(own, metadata)
        if kind == "lora":
            norms = {path: drawn(delta.leaves["lora_up"].shape[0]).abs() + 0.1 for path, (delta,) in own.items()}
            dora = {p: (read_delta(kind, {**d.leaves, "dora_scale": norms[p]}, alpha),) for p, (d,) in own.items()}
            adapters["lora, DoRA by outputs"] = Adapter(dora, metadata)
        if kind != "oft":
            split = read_layers({path: (path, deltas) for path, deltas in fused.items()}, "flux1").layers
            parts = {f"transformer.{layer}": deltas for found in split.values() for layer, deltas in found}
            adapters[f"{name}, of a fused layer"] = Adapter(parts, metadata)
    return adapters


def outcome(adapter: Adapter, dialect: str, folder: Path) -> str:
    """Return ``↔`` (bit for bit), ``–`` (refused), or the largest error if the file differs from the adapter."""
    suffix = written_dialects()[dialect].suffix(adapter)
    try:
        path = adapter.save(folder / f"a{suffix}", dialect)
    except DiffgraftError:
        return "–"
    comparison = compare(adapter, load_adapter(path))
    return "↔" if comparison.same else f"{comparison.worst[1]:.1g}"


def table(adapters: Mapping[str, Adapter]) -> str:
    """Return a Markdown table with a row for each of `adapters` and a column for each format."""
    lines = [
        f"| | {' | '.join(f'`{name}`' for name in written_dialects())} |",
        "|-" * (len(written_dialects()) + 1) + "|",
    ]
    for name, adapter in adapters.items():
        cells = []
        for dialect in written_dialects():
            with tempfile.TemporaryDirectory() as folder:
                cells.append(outcome(adapter, dialect, Path(folder)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the text of the page."""
    return HEAD + table(samples()) + TRANSFORMERS + table(transformer_samples()) + TAIL


if __name__ == "__main__":
    write_text(PAGE, page())
