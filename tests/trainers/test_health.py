"""A run that goes wrong says where, and loses nothing; modules that learn nothing are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffgraft.adapters.factors import FactorLayer
from diffgraft.adapters.patch import AdapterLayer, AttachedLayers
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.hooks.checkpoint import checkpoints
from diffgraft.trainers.hooks.health import GradMonitor, first_nonfinite_grad
from diffgraft.trainers.optim.optimizers import _FACTORIES
from diffgraft.trainers.run.train import train
from tests.conftest import SHORT
from tests.recipes import SUBJECT
from tests.trainers.gpu_checks import overflowing, with_scaler


def test_modules_are_counted_as_still_until_one_of_their_parameters_has_a_gradient() -> None:
    values = {name: nn.Parameter(torch.ones(3, 2)) for name in ("unet.a.down", "unet.a.up", "unet.b.down", "unet.b.up")}
    paths = {name: name.rpartition(".")[0] for name in values}
    health = GradMonitor(values, paths)
    assert health.modules_without_grad() == []
    values["unet.a.up"].grad = torch.zeros(3, 2)
    values["unet.b.down"].grad = torch.zeros(3, 2)
    health.after_backward()
    assert health.modules_without_grad() == ["unet.a", "unet.b"]
    values["unet.a.up"].grad = torch.eye(3, 2)
    health.after_backward()
    assert health.modules_without_grad() == ["unet.b"]
    assert first_nonfinite_grad(values, paths) == ""
    values["unet.b.down"].grad = torch.full((3, 2), torch.inf)
    assert first_nonfinite_grad(values, paths) == "unet.b"


@pytest.mark.filterwarnings("ignore:lr=.* is far too large for")
def test_a_run_that_diverges_says_where_and_keeps_what_it_had(base: Base, pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SHORT, "steps": 5, "checkpoint_every": 0, "sample_prompts": "a dog", "lr": 1e30}
    with pytest.raises(DiffgraftError) as caught:
        train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    said = str(caught.value)
    assert "Training diverged at step 2: the loss is" in said
    assert "the first non-finite gradient is that of unet." in said
    names = sorted(path.name for path in pictures.iterdir() if path.suffix == ".png")
    assert sum(name in said for name in names) >= 4
    assert "class image" in said
    (kept,) = checkpoints(tmp_path / "run")
    assert kept.name == "step-000001"
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_gradient_that_is_no_number_stops_a_run_before_it_moves(
    base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is a number still, and one layer's gradient is not."""
    path, seen = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k", [0]

    def spoilt(self: AdapterLayer, layer: nn.Module, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = plain(self, layer, x, out)
        if layer is base.unet.get_submodule(path) and torch.is_grad_enabled():
            seen[0] += 1
            if seen[0] > 2:  # of the third step on; said again, it is the same
                changed.register_hook(lambda grad: grad * torch.inf)
        return changed

    plain = FactorLayer.forward
    monkeypatch.setattr(FactorLayer, "forward", spoilt)
    settings: dict[str, Any] = {**SHORT, "steps": 5, "sample_prompts": "a dog", "prior": {"weight": 0}}
    with pytest.raises(DiffgraftError, match=rf"at step 3: the loss is 0\.\d+, and the first .* unet\.{path}"):
        train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    assert [kept.name for kept in checkpoints(tmp_path / "run")] == ["step-000002"]
    monkeypatch.undo()
    assert train(base=base, resume=tmp_path / "run").metrics[-1]["step"] == 5


@pytest.mark.parametrize(("overflows", "fused"), [(3, True), (1000, False), (1000, True)])
def test_overflows_in_half_precision_are_left_out_until_they_do_not_end(
    overflows: int, fused: bool, base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused optimiser leaves an update out by itself, and says so to nobody: it is the gradients that are watched."""
    path = overflowing(base, overflows, monkeypatch)
    monkeypatch.setattr("diffgraft.trainers.run.train.new_accelerator", with_scaler)
    monkeypatch.setitem(
        _FACTORIES, "adamw", lambda groups, recipe: torch.optim.AdamW(groups, lr=recipe.lr, fused=fused)
    )
    settings: dict[str, Any] = {**SHORT, "checkpoint_every": 0, "prior": {"weight": 0}, "batch": 1}
    settings["steps"] = 8 if overflows < 20 else 24
    settings |= {"images": pictures, "output": tmp_path / "run", "sample_prompts": "a dog"}
    if overflows < 20:
        run = train(SUBJECT, base=base, **settings)
        assert [entry["step"] for entry in run.metrics] == list(range(1, 9))
        assert all(delta.leaves["lora_up"].isfinite().all() for (delta,) in run.adapter.deltas.values())
        assert any(delta.leaves["lora_up"].any() for (delta,) in run.adapter.deltas.values())
        return
    told = rf"at step 20, after 20 skipped updates in a row: the loss is 0\.\d+, and the first .* unet\.{path}"
    with pytest.raises(DiffgraftError, match=told) as caught:
        train(SUBJECT, base=base, **settings)
    names = sorted(file.name for file in pictures.iterdir() if file.suffix == ".png")
    assert sum(name in str(caught.value) for name in names) == 1
    (kept,) = checkpoints(tmp_path / "run")
    assert kept.name == "step-000019"
    held = load_file(kept / "parameters.safetensors")
    assert not any(value.any() for name, value in held.items() if name.endswith("lora_up"))  # nothing has moved


def test_modules_that_never_moved_are_named(
    base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them; here two layers are cut off from the loss."""
    settings: dict[str, Any] = {**SHORT, "steps": 2, "sample_prompts": "a dog", "prior": {"weight": 0}}
    attention = base.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    cut = (attention.to_q, attention.to_v)

    plain = AttachedLayers._hook

    def hooked(live: AttachedLayers, own: AdapterLayer) -> Any:
        change = plain(live, own)
        return lambda layer, args, out: change(layer, args, out).detach() if layer in cut else change(layer, args, out)

    monkeypatch.setattr(AttachedLayers, "_hook", hooked)
    with pytest.warns(UserWarning, match="2 modules never received a gradient") as told:
        train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    assert str(told[0].message).endswith(f": {path}.to_q, {path}.to_v.")
