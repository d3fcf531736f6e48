"""peft's folders: it reads what we write, and we read what it writes, on bases of every family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Spec
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.registry import get_method, read_delta
from diffgraft.bases.layers import choose_layers, parts_of
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from tests.adapters.test_families import said
from tests.adapters.toys import shaken
from tests.conftest import fresh

FAMILIES = ["sd1", "sdxl"]
"""One with convolutions before and after attention, and one with linear layers there and two text encoders; sd2 has
nothing that neither has"""


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
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "loha tucker", "lokr", "lokr whole", "lokr tucker"])
def test_its_folders_are_read(kind: str, family: str, folders: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    base, other = fresh(folders / family), fresh(folders / family)
    bare = said(base)
    for part, module in parts_of(other).items():
        torch.manual_seed(3)
        model = get_peft_model(module, configs(part, module)[kind])
        shaken(model, "magnitude")
        model.save_pretrained(tmp_path / part)
    wanted = said(other)
    assert (wanted - bare).abs().max() > 1e-3
    found = load_adapter(tmp_path)
    assert found.method == kind.split(" ")[0].replace("rslora", "lora").replace("dora", "lora")
    with graft(base, {found: 1.0}):
        torch.testing.assert_close(said(base), wanted, rtol=1e-3, atol=1e-4)
    alone = load_adapter(tmp_path / "unet")
    assert set(alone.modules) == {path for path in found.modules if path.startswith("unet.")}


MIXED: dict[str, Any] = {"ranks": {"text_encoder": 1, "*.attn2.*": 4, "OUT*": 3}, "alphas": {"M00": 5, "*.to_v": 1}}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "locon, mixed": ("locon", MIXED),
    "loha, mixed": ("loha", MIXED),
    "lokr, mixed": ("lokr", MIXED),
    "dora": ("lora", {"dora": True}),
    "locon": ("locon", {}),
    "loha": ("loha", {}),
    "loha, tucker": ("loha", {"tucker": True}),
    "lokr": ("lokr", {}),
    "lokr, factor": ("lokr", {"factor": 2}),
    "lokr, both": ("lokr", {"decompose_both": True}),
    "lokr, tucker": ("lokr", {"tucker": True}),
    "lokr, whole": ("lokr", {"full_matrix": True}),
}


@peft_asks
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OURS)
def test_it_reads_what_we_write(name: str, family: str, folders: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    method, given = OURS[name]
    base, other = fresh(folders / family), fresh(folders / family)
    chosen = get_method(method)
    options = chosen.read_options(given)
    paths = {part: choose_layers(part, m, chosen.layers_under(options)) for part, m in parts_of(base).items()}
    live = chosen.attach(base, Spec(paths, 2, 3.0, 0, options))
    shaken(live, "")
    adapter = live.adapter({"method": chosen.name})
    live.detach()
    written = adapter.save(tmp_path / "peft", "peft")
    again = load_adapter(written)
    known = {"base": {"family": "sdxl"}} if family == "sdxl" else {}  # as the second text encoder tells
    assert again.metadata == {**adapter.metadata, **known}
    with graft(base, {adapter: 1.0}):
        wanted = said(base)
    with graft(base, {again: 1.0}):
        assert torch.equal(said(base), wanted)
    bare = said(other)
    for part, module in parts_of(other).items():
        PeftModel.from_pretrained(module, written / part)
    assert (said(other) - bare).abs().max() > 1e-3
    torch.testing.assert_close(said(other), wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(DiffgraftError, match="give the name of a new folder"):
        adapter.save(written, "peft")


def test_factors_that_no_one_setting_gives_are_refused(tmp_path: Path) -> None:
    """Of layers that were divided by different numbers, or split where peft would not."""

    def lokr(*shapes: tuple[int, ...]) -> tuple[Delta, ...]:
        names = ("lokr_w1", "lokr_w2") if len(shapes) == 2 else ("lokr_w1", "lokr_w2_a", "lokr_w2_b")
        return (read_delta("lokr", {n: torch.ones(s) for n, s in zip(names, shapes, strict=True)}, 2.0),)

    for deltas, answer in (
        # LyCORIS' factor 4: where it is the larger, it comes second there and first in peft
        ({"unet.a": lokr((2, 2), (4, 4)), "unet.b": lokr((4, 4), (12, 12))}, "have different factors"),
        ({"unet.a": lokr((3, 2), (8, 10)), "unet.b": lokr((4, 6), (10, 10))}, "have different factors"),
        ({"unet.a": lokr((2, 2), (4, 3), (3, 4))}, "peft's LoKr would have lokr_w1, lokr_w2"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            Adapter(deltas).save(tmp_path / "x", "peft")
    assert not list(tmp_path.iterdir())


def test_what_peft_has_no_folder_for_is_refused(tmp_path: Path) -> None:
    lora = low_rank(torch.ones(2, 5), torch.ones(7, 2))
    word = Adapter({"unet.a": (lora,)}, {}, tokens={"<zorp>": {"text_encoder": torch.ones(1, 8)}})
    for adapter, answer in (
        (word, "it holds words"),
        (Adapter({"unet.a": (lora, lora)}), "holds 2 deltas"),
        (Adapter({"vae.a": (lora,)}), "is not in"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            adapter.save(tmp_path / "x", "peft")
    odd = Adapter({"unet.a": (lora,)}).save(tmp_path / "odd", "peft")  # a name that does not tell the part
    assert [path.name for path in odd.iterdir()] == ["unet"]
    assert load_adapter(odd).modules == ["unet.a"]
    plain = Adapter({"unet.mid_block.a": (lora,)}).save(tmp_path / "good", "peft")
    config = json.loads((plain / "adapter_config.json").read_text())
    for change, answer in (
        ({"peft_type": "OFT"}, "it is of peft's type OFT; supported are LORA, LOHA, LOKR"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "only plain module paths"),
        ({"lora_alpha": "x"}, "its alpha is 'x'; expected a finite number"),
    ):
        (plain / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(DiffgraftError, match=answer):
            load_adapter(plain)
    (plain / "adapter_config.json").write_text("{")
    with pytest.raises(DiffgraftError, match="is not valid JSON"):
        load_adapter(plain)
    with pytest.raises(DiffgraftError, match="pass the folder"):
        load_adapter(plain / "adapter_model.safetensors")
