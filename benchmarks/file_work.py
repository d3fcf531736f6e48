"""Times of operations on files of real sizes: ``python -m benchmarks.file_work`` measures them and writes the page.

Adapters have random factors on all layers of Stable Diffusion 1.5 (350) and XL (1052). The two checkpoints of Stable
Diffusion 1.5 have random weights, which differ by matrices of rank 24. It takes a few minutes, 12 GB of memory and 6 GB
of disk.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.scale import random_base
from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.factors import FactorDelta, Factors
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.adapters.methods.loha import HADAMARD
from diffgraft.adapters.methods.lora import LOW_RANK
from diffgraft.adapters.ops.combine import combine
from diffgraft.adapters.ops.convert import convert
from diffgraft.adapters.ops.extract import extract
from diffgraft.adapters.ops.inspect import inspect
from diffgraft.adapters.ops.resize import resize
from diffgraft.bases import load_base
from diffgraft.bases.ldm_keys import ldm_state_dict
from diffgraft.bases.shapes import layer_shapes
from diffgraft.bases.weights import open_weights
from diffgraft.files import write_safetensors, write_text
from diffgraft.generation.merge_checkpoint import merge_checkpoint

PAGE = Path(__file__).parent / "results" / "file-work.md"
HEAD = """# Times of operations on files of real sizes

`python -m benchmarks.file_work` wrote this page, on {threads} threads of a processor. The adapters have random factors
in half precision on all layers of the real configurations; the checkpoints are of Stable Diffusion 1.5 with random
weights.

| base | operation | seconds |
|-|-|-|
"""


@dataclass(frozen=True)
class Job:
    """A timed operation."""

    family: str
    work: str
    seconds: float


def on_every_layer(family: str, factors: Factors, rank: int, seed: int) -> Adapter:
    """Return an adapter with random factors on all linear layers and convolutions of a family."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for path, shape in layer_shapes(family).items():
        if len(shape) in (2, 4) and not path.endswith("_embedding"):
            start = factors.init_leaves(shape, rank, generator)
            leaves = {key: 0.02 * torch.randn(leaf.shape, generator=generator).half() for key, leaf in start.items()}
            deltas[path] = (FactorDelta(factors, leaves, float(rank)),)
    return Adapter(deltas, {"method": factors.kind, "base": {"family": family}})


def on_adapters(family: str, folder: Path) -> Iterator[Job]:
    """Time operations on adapters, which need no base, with files in `folder`."""
    lora = on_every_layer(family, LOW_RANK, 32, 1).save(folder / "lora.safetensors", "kohya")
    loha = on_every_layer(family, HADAMARD, 8, 2).save(folder / "loha.safetensors", "lycoris")
    steps: dict[str, Callable[[], Any]] = {
        "read a LoRA of rank 32": lambda: load_adapter(lora),
        "convert the LoRA for diffusers": lambda: convert(lora, folder / "new.safetensors", "diffusers"),
        "resize the LoRA to rank 8": lambda: resize(load_adapter(lora), RankBudget(rank=8)),
        "resize the LoRA to 90 % of its energy": lambda: resize(load_adapter(lora), RankBudget(energy=0.9)),
        "inspect the LoRA": lambda: inspect(load_adapter(lora)),
        "inspect a LoHa of rank 8": lambda: inspect(load_adapter(loha)),
        "resize the LoHa to rank 16": lambda: resize(load_adapter(loha), RankBudget(rank=16)),
        "combine LoRA and LoHa exactly": lambda: combine(
            [("1", load_adapter(lora), 0.5), ("2", load_adapter(loha), 0.5)]
        ),
        "combine LoRA and LoHa at rank 32": lambda: combine(
            [("1", load_adapter(lora), 0.5), ("2", load_adapter(loha), 0.5)], RankBudget(rank=32)
        ),
    }
    for work, step in steps.items():
        yield _timed(family, work, step)


def on_checkpoints(folder: Path) -> Iterator[Job]:
    """Time operations on checkpoints of Stable Diffusion 1.5, with files in `folder`."""
    files = {name: folder / f"{name}.safetensors" for name in ("base", "tuned")}
    weights = {name: value.half() for name, value in ldm_state_dict(random_base("sd1")).items()}
    write_safetensors(files["base"], weights, {})
    generator = torch.Generator().manual_seed(3)
    write_safetensors(files["tuned"], {name: _changed(name, w, generator) for name, w in weights.items()}, {})
    del weights

    def difference(size: RankBudget) -> None:
        with open_weights(files["tuned"]) as tuned, open_weights(files["base"]) as base:
            extract(tuned, base, size)

    lora = on_every_layer("sd1", LOW_RANK, 32, 1).save(folder / "lora.safetensors")
    steps: dict[str, Callable[[], Any]] = {
        "extract a LoCon of rank 16": lambda: difference(RankBudget(rank=16)),
        "extract a LoCon with 95 % of the energy": lambda: difference(RankBudget(energy=0.95)),
        "merge a LoRA into the checkpoint": lambda: merge_checkpoint(
            load_base(files["base"], None), {lora: 1.0}, folder / "new"
        ),
        "convert a checkpoint to a folder": lambda: merge_checkpoint(
            load_base(files["base"], None), {}, folder / "folder"
        ),
    }
    for work, step in steps.items():
        yield _timed("sd1", work, step)


def _changed(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    if weight.ndim < 2 or name.startswith("first_stage_model.") or "embedding" in name:
        return weight
    out, rest = weight.shape[0], weight[0].numel()
    thin = torch.randn(out, 24, generator=generator) @ torch.randn(24, rest, generator=generator)
    return (weight.float() + 0.01 * thin.view(weight.shape)).half()


def _timed(family: str, work: str, step: Callable[[], Any]) -> Job:
    start = time.perf_counter()
    step()
    return Job(family, work, time.perf_counter() - start)


def main() -> None:
    jobs: list[Job] = []
    with tempfile.TemporaryDirectory() as folder:
        for family in ("sd1", "sdxl"):
            (Path(folder) / family).mkdir()
            layer_shapes(family)  # fill the cache, which takes a second or two
            jobs += tqdm(on_adapters(family, Path(folder) / family), f"adapters for {family}")
        jobs += tqdm(on_checkpoints(Path(folder)), "checkpoints")
    text = HEAD.format(threads=torch.get_num_threads())
    text += "".join(f"| `{job.family}` | {job.work} | {job.seconds:.1f} |\n" for job in jobs)
    write_text(PAGE, text)


if __name__ == "__main__":
    main()
