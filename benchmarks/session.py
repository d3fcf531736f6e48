"""Adapters in a session beside diffusers, on Stable Diffusion 1.5's real shape.

``python -m benchmarks.session`` measures both, in turn, and writes the page. A LoRA in kohya's names, with random
factors, lies on the 192 attention and feed-forward layers that kohya's scripts train by default. It takes some minutes
and 8 GB of memory.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale import random_base
from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.methods.lora import LOW_RANK
from diffgraft.bases.shapes import layer_shapes
from diffgraft.files import write_text
from diffgraft.generation.session import Session

PAGE = Path(__file__).parent / "results" / "session.md"
ROUNDS = 5
RANK, SIDE = 16, 32
"""Rank of the LoRA, and side of the latents"""
HEAD = """# Adapters in a session beside diffusers

`python -m benchmarks.session` wrote this page: Stable Diffusion 1.5's real configuration with random weights in
float32, and a LoRA of rank {rank} in kohya's names on {modules} layers, on {threads} thread(s) of a processor. Both
sides take turns; the figures are medians of {rounds} rounds. diffusers merges the LoRA into the weights, a session lays
it beside the layers; *a prediction with it* is one of the denoiser for a prompt and its negative prompt at 256 pixels.

| work | diffgraft | diffusers | ratio |
|-|-|-|-|
"""


def kohya_file(folder: Path) -> tuple[Path, int]:
    """Write the LoRA, and return its file and the number of its layers."""
    generator, deltas = torch.Generator().manual_seed(0), {}
    endings = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
    for path, shape in layer_shapes("sd1").items():
        if path.startswith("unet.") and path.endswith(endings):
            down = torch.randn(RANK, *shape[1:], generator=generator) / 50
            up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator) / 50
            deltas[path] = (FactorDelta(LOW_RANK, {"lora_down": down, "lora_up": up}, float(RANK)),)
    file = folder / "lora.safetensors"
    Adapter(deltas, {}).save(file, "kohya")
    return file, len(deltas)


def measure(folder: Path) -> tuple[int, dict[str, tuple[list[float], list[float]]]]:
    """Return the number of layers, and the seconds of each work on both sides."""
    file, modules = kohya_file(folder)
    base = random_base("sd1")
    pipe = base.pipeline()
    session = Session(base)
    seconds: dict[str, tuple[list[float], list[float]]] = {
        work: ([], []) for work in ("apply a file", "change its strength", "a prediction with it")
    }

    noisy, times, states = torch.randn(2, 4, SIDE, SIDE), torch.tensor([500, 500]), base.condition(["a dog", ""])

    @torch.no_grad()
    def predict() -> None:
        base.denoise(noisy, times, states)

    def theirs_applied() -> None:
        pipe.load_lora_weights(file, adapter_name="lora")
        pipe.fuse_lora(lora_scale=1.0, adapter_names=["lora"])

    def theirs_changed() -> None:
        pipe.unfuse_lora()
        pipe.set_adapters(["lora"], [0.5])
        pipe.fuse_lora(lora_scale=1.0, adapter_names=["lora"])

    def theirs_removed() -> None:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()

    for _ in range(ROUNDS):
        own = Session(base)  # a file that was read before would not be read again
        seconds["apply a file"][0].append(timed(lambda own=own: own.use(file, 1.0, "lora")))
        seconds["change its strength"][0].append(timed(lambda own=own: own.use(file, 0.5, "lora")))
        seconds["a prediction with it"][0].append(timed(predict))
        own.close()
        seconds["apply a file"][1].append(timed(theirs_applied))
        seconds["change its strength"][1].append(timed(theirs_changed))
        seconds["a prediction with it"][1].append(timed(predict))
        theirs_removed()
    session.close()
    return modules, seconds


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds of a piece of work."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure, and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        modules, seconds = measure(Path(folder))
    lines = [HEAD.format(rank=RANK, modules=modules, threads=torch.get_num_threads(), rounds=ROUNDS)]
    for work, (ours, theirs) in seconds.items():
        own, other = statistics.median(ours), statistics.median(theirs)
        lines.append(f"| {work} | {own:.2f} s | {other:.2f} s | {own / other:.2f} |\n")
    write_text(PAGE, "".join(lines))


if __name__ == "__main__":
    main()
