"""The memory that a plan tells is what PyTorch's own profiler counts in a step of training, within a tenth."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only

import diffgraft as dg
from diffgraft.bases import Base
from diffgraft.bases.meta_base import meta_base
from diffgraft.bases.quantized import bytes_when_quantized
from diffgraft.trainers.loop import TrainingLoop
from diffgraft.trainers.planning.live_bytes import LiveBytes
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.runtime.block_swap import swapped_blocks
from tests.conftest import SHORT, flow_folder_of
from tests.recipes import SUBJECT
from tests.trainers.test_plan import cost_of

SIDE = 64
SETTINGS: dict[str, Any] = {
    **SHORT,
    "steps": 2,
    "checkpoint_every": 0,
    "resolution": SIDE,
    "batch": 2,
    "prior": {"weight": 0},
    "trigger": "a",
    "prompt": "a dog",
}


def profiled(step: Callable[[], float]) -> tuple[float, int]:
    """The result of a step, and the most bytes that it allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = step()
    now = most = 0
    events: Any = recorded.profiler
    for event in events.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return loss, most


def watched(step: Callable[[], float]) -> tuple[float, int]:
    """As `profiled` in half precision as on GPUs, with norms in float32, and without memory that kernels use inside."""
    with LiveBytes() as held, pytest.MonkeyPatch.context() as patch:
        for name in ("layer_norm", "rms_norm"):
            patch.setattr(F, name, in_float32(getattr(F, name)))
        loss = step()
    return loss, held.peak


@contextmanager
def measured(how: Any) -> Iterator[list[int]]:
    """Within the block the bytes of each step are listed: what it allocates, parameters and optimizer state."""
    found: list[int] = []
    plain = TrainingLoop._step

    def step(self: TrainingLoop, number: int) -> float:
        loss, most = how(lambda: plain(self, number))
        states = (value for state in self.state.optimizer.state.values() for value in state.values())
        kept = [*self.state.parameters.values(), *(value for value in states if isinstance(value, Tensor))]
        ema = 4 * sum(value.numel() for value in self.state.parameters.values()) if self.state.ema else 0
        found.append(most + sum(value.nbytes for value in kept) + ema)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_step", step)
        yield found


def compared(base: Base, pictures: Path, folder: Path, how: Any = profiled, **settings: Any) -> tuple[int, int]:
    """The bytes that a plan tells, and those of the second step of a run, frozen weights included."""
    settings = {**SETTINGS, **settings}
    with measured(how) as found:
        dg.train(SUBJECT, base=base, images=pictures, output=folder, **settings)
    recipe = load_recipe(SUBJECT, settings)
    empty = meta_base(base.name, base.denoiser.dtype)
    weights = bytes_when_quantized(empty.denoiser, recipe.quantize)
    sizes = [bytes_when_quantized(block, recipe.quantize) for block in swapped_blocks(empty, recipe.block_swap)]
    weights += 2 * max(sizes, default=0) - sum(sizes)
    return cost_of(recipe, empty, (SIDE, SIDE)).memory, found[-1] + weights


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["flux2-klein", "zimage", "qwen-image"])
def test_a_step_takes_what_was_planned(
    family: str, checkpointing: bool, pictures: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = dg.load_base(flow_folder_of(family, tmp_path_factory))
    told, taken = compared(base, pictures, tmp_path, gradient_checkpointing=checkpointing)
    assert told == pytest.approx(taken, rel=0.1)


@pytest.fixture(scope="module")
def klein_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flow_folder_of("flux2-klein", tmp_path_factory)


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate": 2, "ema": 0.9},
        {"rank": 64, "accumulate": 2, "layers": "all"},
        {"quantize": "nf4", "gradient_checkpointing": True},
        {"quantize": "int8", "gradient_checkpointing": True, "block_swap": 3},
    ],
    ids=str,
)
def test_other_settings(settings: dict[str, Any], klein_folder: Path, pictures: Path, tmp_path: Path) -> None:
    base = dg.load_base(klein_folder, quantize=settings.get("quantize", "none"))
    told, taken = compared(base, pictures, tmp_path, **settings)
    assert told == pytest.approx(taken, rel=0.1)


def test_half_precision(klein_folder: Path, pictures: Path, tmp_path: Path) -> None:
    base = dg.load_base(klein_folder, torch.bfloat16)
    told, taken = compared(base, pictures, tmp_path, watched, precision="bfloat16", gradient_checkpointing=True)
    assert told == pytest.approx(taken, rel=0.1)


def in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def called(*args: Any, **options: Any) -> Tensor:
        return norm(*tree_map_only(Tensor, Tensor.float, args), **tree_map_only(Tensor, Tensor.float, options))

    return called


def test_storages_count_once_until_they_are_released() -> None:
    before = torch.ones(7, 30)
    with LiveBytes() as held:
        view = before.T
        assert held.now == 0
        first = view * 2
        second = first[:4] + 1  # 4 × 7 of the 30 × 7
        assert (held.now, held.peak) == (4 * (7 * 30 + 7 * 4), 4 * (7 * 30 + 7 * 4))
        del first
        third = second.neg_()
        assert held.now == 4 * 7 * 4
        del second
        assert held.now == 4 * 7 * 4
        del third
        assert (held.now, held.peak) == (0, 4 * (7 * 30 + 7 * 4))
