"""Blocks that wait in main memory: the same bytes are learned, and no weight is read before it is on the device.

On a processor the slots of a device are in main memory, too; here it is watched that nothing else is computed with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffgraft as dg
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.runtime.block_swap import BlockSwap, swapped_blocks, swapped_bytes
from tests.conftest import FLOW_FAMILIES, SHORT, flow_folder_of
from tests.recipes import SUBJECT
from tests.trainers import gpu_checks

QUICK: dict[str, Any] = {
    **SHORT,
    "steps": 2,
    "checkpoint_every": 0,
    "resolution": 32,
    "batch": 1,
    "prior": {"weight": 0},
    "lr": 1e-2,
    "gradient_checkpointing": True,
}
_TWO = ("sd3", "qwen-image", "qwen-image-21", "krea2", "anima")
ALL = {name: 2 if name in _TWO else 3 for name in FLOW_FAMILIES} | {"zimage": 4}
"""Family → number of blocks of its small base"""


class _Watch(TorchDispatchMode):
    """Fails if an operation reads weights in main memory, but for copying them to a slot."""

    def __init__(self, swap: BlockSwap) -> None:
        super().__init__()
        self.waiting = {host.untyped_storage().data_ptr() for own in swap._weights for _, host in own}
        self.most, self.swap, self.copies = 0, swap, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        waiting = [value for value in read if value.untyped_storage().data_ptr() in self.waiting]
        if func is torch.ops.aten.copy_.default and waiting == [args[1]]:
            self.copies += 1
        elif func is not torch.ops.aten.detach.default:  # of `value.data`, which reads no number
            assert not waiting, f"{func} computes with weights in main memory"
        self.most = max(self.most, self.swap.resident())
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[list[_Watch]]:
    """Within the block the steps of a run are watched; the list has the watch of each step."""
    from diffgraft.trainers.loop import TrainingLoop

    swaps: list[BlockSwap] = []
    watches: list[_Watch] = []
    begin, step = BlockSwap.__init__, TrainingLoop._step

    def noted(self: BlockSwap, *args: Any) -> None:
        begin(self, *args)
        swaps.append(self)

    def watched_step(self: TrainingLoop, number: int) -> float:
        with _Watch(swaps[-1]) as watch:
            watches.append(watch)
            before = watch.swap.loads
            loss = step(self, number)
            watch.loads = watch.swap.loads - before  # type: ignore[attr-defined]
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockSwap, "__init__", noted)
        patch.setattr(TrainingLoop, "_step", watched_step)
        yield watches


def trained(base: Base, pictures: Path, folder: Path, **settings: Any) -> Run:
    before = gpu_checks.checksums(base)
    run = dg.train(SUBJECT, base=base, images=pictures, output=folder, **{**QUICK, **settings})
    assert gpu_checks.checksums(base) == before
    return run


def test_the_same_bytes_with_two_blocks_on_the_device(flow_base: Base, pictures: Path, tmp_path: Path) -> None:
    plain = trained(flow_base, pictures, tmp_path / "plain")
    count = ALL[flow_base.family.name]
    sizes = [sum(value.nbytes for value in block.parameters()) for block in swapped_blocks(flow_base, count)]
    with watched() as watches:
        swapped = trained(flow_base, pictures, tmp_path / "swapped", block_swap=count)
    assert swapped.adapter_file.read_bytes() == plain.adapter_file.read_bytes()
    (first, second) = watches
    # a step goes up and down, and where it turns the two blocks are there already
    assert (first.loads, second.loads) == (2 * count - 2, 2 * count - 4)  # type: ignore[attr-defined]
    assert max(sizes) <= first.most <= sum(sorted(sizes)[-2:])
    waiting, slots = swapped_bytes(flow_base, count, "none")
    assert (waiting, slots) == (sum(sizes), 2 * max(sizes))


METHODS: list[dict[str, Any]] = [
    {"method": "lora", "options": {"dora": True}, "layers": "all"},
    {"method": "lora", "options": {"init": "pissa"}},
    {"method": "oft"},
    {"method": "tlora"},
]


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return dg.load_base(flow_folder_of("flux2-klein", tmp_path_factory))


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: f"{settings['method']} {settings.get('options')}")
def test_methods_that_read_weights(settings: dict[str, Any], klein: Base, pictures: Path, tmp_path: Path) -> None:
    plain = trained(klein, pictures, tmp_path / "plain", **settings)
    with watched() as watches:
        swapped = trained(klein, pictures, tmp_path / "swapped", block_swap=3, **settings)
    assert swapped.adapter_file.read_bytes() == plain.adapter_file.read_bytes()
    assert all(watch.copies for watch in watches)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_quantized_blocks(kind: Any, klein: Base, pictures: Path, tmp_path: Path) -> None:
    """Their layers read the weight again in the backward pass."""
    base = dg.load_base(klein.name, quantize=kind)
    more: dict[str, Any] = {"quantize": kind, "options": {"dora": True}}
    plain = trained(base, pictures, tmp_path / "plain", **more)
    with watched() as watches:
        swapped = trained(base, pictures, tmp_path / "swapped", block_swap=3, **more)
    assert swapped.adapter_file.read_bytes() == plain.adapter_file.read_bytes()
    assert watches[0].most < swapped_bytes(klein, 3, "none")[1]


def test_pictures_are_those_without_swapping(klein: Base, pictures: Path, tmp_path: Path) -> None:
    """Adapters are merged into weights in main memory: one under the training, and the trained one in the end."""
    under = trained(klein, pictures, tmp_path / "under", steps=3)
    more: dict[str, Any] = {"under": {"adapter": str(under.adapter_file)}, "previews": True, "sample_every": 1}
    more |= {"sample_prompts": "a dog", "prior": {"weight": 1, "images": 2}, "batch": 2}
    drawn = []
    for count in (0, 2):
        run = trained(klein, pictures, tmp_path / str(count), block_swap=count, **more)
        files = [run.before_after, *sorted((run.folder / "samples").iterdir()), run.adapter_file]
        drawn.append([file.read_bytes() for file in files])
    assert drawn[0] == drawn[1]


def test_a_resumed_run_may_swap_other_blocks(klein: Base, pictures: Path, tmp_path: Path) -> None:
    trained(klein, pictures, tmp_path / "run", steps=1)
    run = dg.train(base=klein, resume=tmp_path / "run", steps=2, block_swap=1)
    whole = trained(klein, pictures, tmp_path / "whole", steps=2)
    assert run.adapter_file.read_bytes() == whole.adapter_file.read_bytes()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"gradient_checkpointing": False}, "block_swap=2 needs gradient_checkpointing=true"),
        ({"compile": True}, "compile=true cannot be combined with block_swap=2"),
        ({"shard": "fsdp"}, "shard=fsdp cannot be combined with block_swap=2"),
        ({"block_swap": 4}, r"block_swap=4: the transformer of this base has 3 blocks. Use 3 or less"),
        ({"method": "full"}, "block_swap=2 needs a frozen denoiser"),
    ],
    ids=str,
)
@pytest.mark.parametrize("run", [dg.train, dg.plan])
def test_what_cannot_be_swapped_is_said(
    run: Any, settings: dict[str, Any], why: str, klein: Base, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(DiffgraftError, match=why):
        run(SUBJECT, base=klein, images=pictures, output=tmp_path / "run", **{**QUICK, "block_swap": 2, **settings})


@pytest.mark.parametrize("run", [dg.train, dg.plan])
def test_unets_are_refused(run: Any, base: Base, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffgraftError, match="block_swap=1 has no meaning for bases of the family sd1: the blocks"):
        run(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **{**QUICK, "block_swap": 1})


def test_a_block_that_is_not_checkpointed_is_refused() -> None:
    swap = BlockSwap([nn.Linear(3, 5)], torch.device("cpu"))
    with pytest.raises(DiffgraftError, match="leaves out a Linear"):
        swap.bring(0)
    with torch.no_grad():
        swap.bring(0)
    swap.close()
