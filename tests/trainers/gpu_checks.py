"""Bodies of tests for any device and any size: small ones on a processor, and those of the real models on a GPU."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffgraft.adapters.factors import FactorLayer
from diffgraft.adapters.patch import AdapterLayer
from diffgraft.bases import Base
from diffgraft.trainers.optim.optimizers import load_eval_weights, new_optimizer
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.train import train
from diffgraft.trainers.runtime.processes import new_accelerator
from tests.bases.test_quantized import predict, whole
from tests.recipes import SUBJECT
from tests.trainers.test_optimizers import parameters, recipe_of, walk

SETTINGS: dict[str, Any] = {
    "subject": "dog",
    "steps": 3,
    "batch": 2,
    "seed": 3,
    "lr": 1e-3,
    "sample_every": 0,
    "checkpoint_every": 0,
    "prior": {"weight": 0},
    "sample_prompts": "a dog",
}


def checksums(base: Base) -> dict[str, int]:
    """Of all the bits of a base."""
    state = {f"{part}.{k}": v for part, module in base.parts() for k, v in module.state_dict().items()}
    bytes_of = lambda value: value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()  # noqa: E731
    return {name: zlib.crc32(bytes_of(value)) for name, value in state.items() if value.numel()}


def trained(base: Base, pictures: Path, folder: Path, **settings: Any) -> Run:
    """A run; it has learnt numbers, and the base is where it was and has the bits that it had."""
    before, was_on = checksums(base), base.device
    run = train(SUBJECT, base=base, images=pictures, output=folder, **{**SETTINGS, **settings})
    assert base.device == was_on
    assert checksums(base) == before
    losses = losses_of(run)
    assert len(losses) == run.recipe.steps
    assert len(set(losses)) > 1
    assert all(0 < loss < 10 for loss in losses)
    leaves = [leaf for deltas in run.adapter.deltas.values() for delta in deltas for leaf in delta.leaves.values()]
    assert all(leaf.isfinite().all() for leaf in leaves)
    assert run.before_after.is_file()
    return run


def losses_of(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.metrics]


def stopped_and_never_stopped(base: Base, pictures: Path, folder: Path, **settings: Any) -> tuple[Run, Run]:
    """Four steps in one, and two and two more."""
    settings = {**settings, "checkpoint_every": 2}
    never = trained(base, pictures, folder / "never", **{**settings, "steps": 4})
    trained(base, pictures, folder / "stopped", **{**settings, "steps": 2})
    return train(base=base, resume=folder / "stopped", steps=4), never


@torch.no_grad()
def as_float_weights_say(base: Base, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a quantised base predicts on a device, and what float weights do; then it is back, and the same.

    It has been used before it is moved, as a base is that has encoded its prompts.
    """
    before, was_on = checksums(base), base.device
    asked = ((base, was_on), (base, device), (whole(base), device))
    first, found, wanted = (predict(one.to(to), ["a dog", "a cat"], side=16) for one, to in asked)
    assert found.device.type == device.type
    assert checksums(base.to(was_on)) == before
    assert torch.equal(predict(base, ["a dog", "a cat"], side=16), first)
    return found.cpu(), wanted.cpu()


def swapped_and_not(
    base: Base, pictures: Path, folder: Path, count: int, **settings: Any
) -> tuple[list[Run], list[int]]:
    """The same run without swapped blocks and with `count`, and the most bytes of a GPU that each took."""
    runs, spent = [], []
    for swapped in (0, count):
        more = {**settings, "gradient_checkpointing": True, "block_swap": swapped}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        runs.append(trained(base, pictures, folder / str(swapped), **more))
        spent.append(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
    return runs, spent


def overflowing(base: Base, times: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The gradient of an early layer overflows in so many steps; its path."""
    path = next(path for path, _ in base.unet.named_modules() if path.endswith("attn1.to_k"))
    plain, seen = FactorLayer.forward, [0]

    def spoilt(self: AdapterLayer, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        changed: Tensor = plain(self, layer, x, out)
        if layer is base.unet.get_submodule(path) and torch.is_grad_enabled():
            seen[0] += 1
            if seen[0] <= times:
                changed.register_hook(lambda grad: grad * torch.inf)
        return changed

    monkeypatch.setattr(FactorLayer, "forward", spoilt)
    return path


def with_scaler(*settings: Any, **named: Any) -> Any:
    """Half precision as on a GPU, which a processor can do, too, though slowly."""
    accelerator = new_accelerator(*settings, **named)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


def walked(name: str, device: torch.device) -> tuple[Mapping[str, Tensor], torch.optim.Optimizer]:
    """Where an optimiser gets on a device, from the same place by the same gradients but for noise."""
    recipe = recipe_of(name)
    values = {key: nn.Parameter(value.detach().to(device)) for key, value in parameters().items()}
    optimizer = new_optimizer(recipe, values, {})
    walk(recipe, values, optimizer, *range(40))
    load_eval_weights(optimizer)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert all(value.device.type == device.type for value in states if value.ndim)
    return {key: value.detach().cpu() for key, value in values.items()}, optimizer
