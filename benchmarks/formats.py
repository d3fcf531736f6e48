"""What goes into which format, and comes back: ``python -m benchmarks.formats`` tries all, and writes the page.

An adapter of every kind, with layers of every shape, is saved in every format and read again.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.factors import Factors
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.methods.hypernetwork import HypernetworkOptions
from diffgraft.adapters.methods.loha import HadamardProduct
from diffgraft.adapters.methods.lokr import Kronecker
from diffgraft.adapters.methods.lora import LowRank
from diffgraft.adapters.ops.compare import compare
from diffgraft.adapters.registry import read_delta, read_network, written_dialects
from diffgraft.bases.shapes import layer_shapes
from diffgraft.errors import DiffgraftError
from diffgraft.files import write_text

PAGE = Path(__file__).parent / "results" / "formats.md"
HEAD = """# What goes into which format

`python -m benchmarks.formats` wrote this page. For each kind of adapter it says what a format makes of it: **↔** is
written and read again with every number the same, to the bit; – is not written: `diffgraft convert` says why and stops,
or approximates it by LoRAs where `--rank` or `--energy` ask for it (what depends on the base's weights needs `--base`).

`kohya` and `lycoris` are the same names; `kohya` adds the header that sd-scripts writes and webui reads. `webui` is
what stable-diffusion-webui *and* ComfyUI read and take to mean the same. `peft` is a folder, with one inside for each
part of the base. `diffgraft` is this project's own layout, described in `adapters/formats/native.py`.

"""
TAIL = """
What other tools wrote, and is read here; `diffgraft convert` makes any of the formats above of it that can hold it:

| files | hold | keys such as |
|-|-|-|
| diffusers, older, or mixed with today's as its scripts write them | LoRA, DoRA | `….to_q.lora.down.weight`, `….attn1.processor.to_q_lora.down.weight` |
| peft, LyCORIS, kohya, webui, ComfyUI | all of the table | as above, with diffusers' or the original's names of blocks |
| LyCORIS on a module of any kind | the same | `lycoris_….lora_down.weight` |
| kohya's OFT | OFT with a bound | `oft_unet_….oft_blocks` |
| cloneofsimo, `.safetensors` and `.pt` | LoRA, with words | `unet:0:up`, `<word>` |
| Custom Diffusion of diffusers | weights in place of others | `….processor.to_k_custom_diffusion.weight` |
| webui's and kohya's words, `.pt` and `.safetensors` | textual inversion | `string_to_param.*`, `emb_params` |
| webui's hypernetworks, `.pt` | hypernetwork | `768` |
| webui's aesthetic embeddings, `.pt` | kept, not drawn with | one row of 768 numbers |
| GLoRA from before May 2024 | GLoRA | its factors are told by their shapes |

A DoRA means the same in every format at strength 1. At others LyCORIS, peft and webui each have their own way; what is
read follows the tool that wrote it, and `diffgraft inspect` names it. ComfyUI squares the strength of OFT and BOFT.
"""  # noqa: E501
LAYERS = (
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.down_blocks.0.attentions.1.proj_in",
    "unet.up_blocks.1.resnets.0.conv1",
    "text_encoder.encoder.layers.3.mlp.fc1",
)
_FACTORS: dict[str, tuple[str, Factors]] = {
    "lora, locon": ("lora", LowRank()),
    "locon, Tucker": ("lora", LowRank(True)),
    "loha": ("loha", HadamardProduct()),
    "loha, Tucker": ("loha", HadamardProduct(True)),
    "lokr": ("lokr", Kronecker()),
}


def samples() -> dict[str, Adapter]:
    """Name of a kind → an adapter of it, on layers of Stable Diffusion 1.5."""
    shapes = {path: layer_shapes("sd1")[path] for path in LAYERS}
    generator = torch.Generator().manual_seed(1)

    def drawn(*sides: int) -> Tensor:
        return 0.1 * torch.randn(*sides, generator=generator)

    def on_all(kind: str, leaves: Mapping[str, Mapping[str, Tensor]], alpha: float | None) -> Adapter:
        deltas: dict[str, tuple[Delta, ...]] = {p: (read_delta(kind, found, alpha),) for p, found in leaves.items()}
        return Adapter(deltas, {"method": kind, "base": {"family": "sd1"}})

    found: dict[str, Adapter] = {}
    for name, (kind, factors) in _FACTORS.items():
        leaves = {path: factors.init_leaves(shape, 2, generator) for path, shape in shapes.items()}
        filled = {path: {key: drawn(*leaf.shape) for key, leaf in own.items()} for path, own in leaves.items()}
        found[name] = on_all(kind, filled, 1.0)
        if "Tucker" not in name:
            for side, axis in (("outputs", 0), ("inputs", 1)):
                dora = {
                    path: {**own, "dora_scale": _row(drawn(shapes[path][axis]).abs() + 0.1, axis, len(shapes[path]))}
                    for path, own in filled.items()
                }
                found[f"{name}, DoRA by {side}"] = on_all(kind, dora, 1.0)
    found["full"] = on_all("full", {p: {"diff": drawn(*s), "diff_b": drawn(s[0])} for p, s in shapes.items()}, None)
    norm = {"unet.conv_norm_out": {"diff": drawn(320), "diff_b": drawn(320)}}
    found["full, of norms"] = on_all("full", norm, None)
    ones = {path: {"weight": drawn(shape[0]), "on_input": torch.tensor(0)} for path, shape in shapes.items()}
    found["(IA)³"] = on_all("ia3", ones, None)
    found["GLoRA"] = on_all("glora", {p: _glora(s, drawn) for p, s in shapes.items() if len(s) == 2}, 1.0)
    found["OFT"] = on_all("oft", {p: {"oft_blocks": drawn(s[0] // 8, 8, 8)} for p, s in shapes.items()}, 0.0)
    found["BOFT"] = on_all("boft", {p: {"oft_blocks": drawn(2, s[0] // 8, 8, 8)} for p, s in shapes.items()}, 0.0)
    words = {"<zorp>": {"text_encoder": drawn(2, 768)}}
    found["textual inversion"] = Adapter({}, {"method": "textual-inversion", "trigger": "<zorp>"}, tokens=words)
    both = {"<zorp>": {"text_encoder": drawn(2, 768), "text_encoder_2": drawn(2, 1280)}}
    found["textual inversion, XL"] = Adapter({}, {"method": "textual-inversion", "trigger": "<zorp>"}, tokens=both)
    found["pivotal"] = Adapter(found["lora, locon"].deltas, {"method": "pivotal"}, tokens=words)
    found["hypernetwork"] = _hypernetwork(drawn)
    return found


def _row(lengths: Tensor, axis: int, axes: int) -> Tensor:
    sides = [1] * axes
    sides[axis] = -1
    return lengths.view(sides)


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


def outcome(adapter: Adapter, dialect: str, folder: Path) -> str:
    """``↔``, ``–``, or the largest error where something changed on the way."""
    suffix = written_dialects()[dialect].suffix(adapter)
    try:
        path = adapter.save(folder / f"a{suffix}", dialect)
    except DiffgraftError:
        return "–"
    found = compare(adapter, load_adapter(path))
    return "↔" if found.same else f"{found.worst[1]:.1g}"


def table() -> str:
    """Markdown: a line for each kind, a column for each format."""
    lines = [
        f"| | {' | '.join(f'`{name}`' for name in written_dialects())} |",
        "|-" * (len(written_dialects()) + 1) + "|",
    ]
    for name, adapter in samples().items():
        cells = []
        for dialect in written_dialects():
            with tempfile.TemporaryDirectory() as folder:
                cells.append(outcome(adapter, dialect, Path(folder)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    return HEAD + table() + TAIL


if __name__ == "__main__":
    write_text(PAGE, page())
