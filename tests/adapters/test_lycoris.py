"""Whole files of LyCORIS, on bases of every family: it reads what we write, and we read what it writes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.kohya import LycorisNetworkKohya, create_network, create_network_from_weights
from lycoris.wrapper import create_lycoris
from safetensors.torch import load_file, save_file
from torch import nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Spec
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base
from diffgraft.bases.layers import choose_layers, parts_of
from diffgraft.bases.ldm_keys import BlockLayout
from diffgraft.generation.graft import graft
from tests.adapters.test_families import said
from tests.conftest import fresh

FAMILIES = ["sd1", "sdxl"]
"""One with convolutions before and after attention, and one with linear layers there and two text encoders; sd2 has
nothing that neither has"""
TARGETS = (
    "UNET_TARGET_REPLACE_MODULE",
    "UNET_TARGET_REPLACE_NAME",
    "TEXT_ENCODER_TARGET_REPLACE_MODULE",
    "TEXT_ENCODER_TARGET_REPLACE_NAME",
)


@pytest.fixture(autouse=True)
def _targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is to adapt stands in attributes of its class: empty here, and put back after each test."""
    for name in TARGETS:
        monkeypatch.setattr(LycorisNetworkKohya, name, [])


def renamed(root: nn.Module, name: Callable[[str], str]) -> nn.Module:
    """A tree over the very layers of `root`, under other paths: LyCORIS goes by the names of live modules."""
    tree = nn.Module()
    for path, module in root.named_modules():
        if [*module.parameters(recurse=False)]:
            *levels, last = name(path).split(".")
            node = tree
            for level in levels:
                if level not in node._modules:
                    node.add_module(level, nn.Module())
                node = node.get_submodule(level)
            node.add_module(last, module)
    return tree


def as_trained_by_kohya(base: Base) -> tuple[Any, nn.Module]:
    """Text encoder(s) and UNet under the names that they have in kohya's trainer."""

    def add_text_model(path: str) -> str:
        return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"

    if base.text_encoder_2 is None:
        return renamed(base.text_encoder, add_text_model), base.unet
    texts = [renamed(encoder, add_text_model) for encoder in (base.text_encoder, base.text_encoder_2)]
    return texts, renamed(base.unet, BlockLayout.from_config(base.unet.config).to_ldm)


MIXED: dict[str, Any] = {"ranks": {"text_encoder": 1, "*.attn2.*": 4, "OUT*": 5}, "alphas": {"M00": 5, "*.to_v": 1}}
OURS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("locon", MIXED),
    ("loha", MIXED),
    ("lokr", MIXED),
    ("lora", {"dora": True}),
    ("locon", {"tucker": True}),
    ("loha", {}),
    ("loha", {"tucker": True}),
    ("lokr", {"decompose_both": True}),
    ("lokr", {"full_matrix": True}),
    ("full", {}),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "options"), OURS)
def test_it_reads_what_we_write(
    method: str, options: dict[str, Any], family: str, folders: Path, tmp_path: Path
) -> None:
    base, other = fresh(folders / family), fresh(folders / family)
    chosen = get_method(method)
    read = chosen.read_options(options)
    paths = {part: choose_layers(part, module, chosen.layers_under(read)) for part, module in parts_of(base).items()}
    live = chosen.attach(base, Spec(paths, 3, 2.0, 0, read))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for value in live.trainable().values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    adapter = live.adapter({"method": method, "base": {"family": family}})
    live.detach()
    if method == "full":  # of which its reader of files takes linear layers and convolutions
        layers = {path for part, module in parts_of(base).items() for path in _layers(part, module)}
        adapter = Adapter({path: own for path, own in adapter.deltas.items() if path in layers}, adapter.metadata)
    file = adapter.save(tmp_path / "a.safetensors", "lycoris")
    with graft(base, {adapter: 1.0}):
        wanted = said(base)
    bare = said(other)
    text, unet = as_trained_by_kohya(other)
    network, _ = create_network_from_weights(1.0, str(file), None, text, unet)
    assert len(network.unet_loras) + len(network.text_encoder_loras) == len(adapter.modules)
    network.apply_to(text, unet, True, True)
    network.eval()
    assert (wanted - bare).abs().max() > 1e-3
    torch.testing.assert_close(said(other), wanted, rtol=1e-3, atol=1e-4)


def _layers(part: str, root: nn.Module) -> list[str]:
    return [
        f"{part}.{path.removeprefix('text_model.')}"
        for path, module in root.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]


THEIRS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, rs": {"rs_lora": True},
    "lora, scalar": {"use_scalar": True},
    "lora, tucker": {"use_tucker": True},
    "lora, dora": {"dora_wd": True},
    "loha": {},
    "loha, tucker": {"use_tucker": True, "use_scalar": True},
    "loha, dora": {"dora_wd": True, "wd_on_output": False},
    "lokr": {"factor": 4},
    "lokr, both": {"decompose_both": True, "use_scalar": True},
    "lokr, whole": {"full_matrix": True},
    "lokr, tucker": {"use_tucker": True},
    "lokr, dora": {"dora_wd": True},
    "full": {},
    "ia3": {},
    "glora": {},
    "diag-oft": {"constraint": 0.02},
    "boft": {"rescaled": True},
    "lora, norms": {"train_norm": True},
}
EVERYWHERE = ("lora", "lora, tucker", "loha", "lokr", "full")


@pytest.mark.parametrize(
    ("family", "name"), [(f, name) for f in FAMILIES for name in THEIRS if f == "sdxl" or name in EVERYWHERE]
)
def test_we_read_what_it_writes(
    family: str, name: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = fresh(folders / family), fresh(folders / family)
    bare = said(other)
    text, unet = as_trained_by_kohya(other)
    network = _made_by_lycoris(name, text, unet, monkeypatch)
    assert len(network.unet_loras) > 20
    assert len(network.text_encoder_loras) >= (0 if name in ("boft", "lora, norms") else 8)
    network.apply_to(text, unet, True, True)
    network.eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    wanted = said(other)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    found = load_adapter(tmp_path / "a.safetensors")
    assert len(found.modules) == len(network.loras)
    assert (wanted - bare).abs().max() > 1e-3
    with graft(base, {found: 1.0}):
        torch.testing.assert_close(said(base), wanted, rtol=1e-3, atol=1e-4)
    # written again, it is what it was
    theirs = load_file(tmp_path / "a.safetensors")
    marked = Adapter(found.deltas, {**found.metadata, "base": {"family": family}})
    ours = load_file(marked.save(tmp_path / "b.safetensors", "lycoris"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], value.to(ours[key].dtype)) for key, value in theirs.items())


def _made_by_lycoris(name: str, text: Any, unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> LycorisNetworkKohya:
    """Its network on layers of every kind, or on norms; BOFT on those whose outputs are a power of two."""
    algo = name.partition(",")[0]
    wanted = nn.GroupNorm | nn.LayerNorm if "norms" in name else nn.Linear | nn.Conv2d
    paths = [
        path
        for root in (unet, *(text if isinstance(text, list) else [text]))
        for path, module in root.named_modules()
        if isinstance(module, wanted) and (algo != "boft" or module.weight.shape[0] in (8, 16, 32))
    ]
    pattern = f"({'|'.join(re.escape(path) for path in sorted(set(paths)))})$"
    monkeypatch.setattr(LycorisNetworkKohya, "UNET_TARGET_REPLACE_NAME", [pattern])
    monkeypatch.setattr(LycorisNetworkKohya, "TEXT_ENCODER_TARGET_REPLACE_NAME", [] if "norms" in name else [pattern])
    monkeypatch.setattr(LycorisNetworkKohya, "apply_preset", classmethod(lambda cls, _: cls))
    options = {"conv_dim": 2, "conv_alpha": 1.5, **THEIRS[name]}
    return create_network(1.0, 3, 2.0, None, text, unet, warn_on_unmatched=False, algo=algo, **options)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_what_its_wrapper_lays_on_one_module(part: str, folders: Path, tmp_path: Path) -> None:
    """The prefix is `lycoris` then, whatever the module is."""
    base, other = fresh(folders / "sd1"), fresh(folders / "sd1")
    torch.manual_seed(2)
    network = create_lycoris(getattr(other, part), 1.0, linear_dim=3, linear_alpha=2.0, algo="loha")
    network.apply_to()
    network.eval()
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    assert all(key.startswith("lycoris_") for key in state)
    save_file(state, tmp_path / "a.safetensors")
    found = load_adapter(tmp_path / "a.safetensors")
    assert {path.partition(".")[0] for path in found.modules} == {part}
    with graft(base, {found: 1.0}):
        torch.testing.assert_close(said(base), said(other), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.02, 0.0])
def test_orthogonal_fine_tuning_of_kohya(alpha: float, tmp_path: Path) -> None:
    """In float64: rows in blocks, each turned by Rᵀ; ‖Q‖ is at most alpha · out, and so nothing where that is 0."""
    generator = torch.Generator().manual_seed(1)
    blocks, weight = torch.randn(4, 5, 5, generator=generator), torch.randn(20, 6, generator=generator)
    start = "oft_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file({f"{start}.oft_blocks": blocks, f"{start}.alpha": torch.tensor(alpha)}, tmp_path / "a.safetensors")
    found = load_adapter(tmp_path / "a.safetensors")
    assert found.modules == ["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]
    ((delta,),) = found.deltas.values()
    q = (blocks - blocks.transpose(1, 2)).double()
    q *= min(1.0, alpha * 20 / float(q.norm()))
    eye = torch.eye(5, dtype=torch.float64)
    turned = (eye + q) @ torch.linalg.inv(eye - q)
    rows = weight.double().view(4, 5, 6)
    for strength in (1.0, 0.3):
        drawn = strength * turned + (1 - strength) * eye
        wanted = torch.cat([drawn[k].T @ rows[k] for k in range(4)])
        torch.testing.assert_close(delta.apply(weight, None, strength)[0].double(), wanted, rtol=1e-5, atol=1e-6)
