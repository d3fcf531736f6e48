"""Adapters in a session beside diffusers: on Stable Diffusion 1.5's real shape, and ten at once on `tiny`.

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
from diffgraft.bases import load_base
from diffgraft.bases.shapes import layer_shapes
from diffgraft.files import write_text
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings

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


TEN_HEAD = """
## Ten adapters at once

Ten LoRAs of rank {rank} on `tiny`, a picture of each, with guidance. A session draws them in one batch, in which each
picture has its own adapter. Beside it: the same session picture by picture; diffusers' `set_adapters` before each
picture, with all ten loaded; and diffusers loading each file before its picture. *No adapter* is the gain of a batch of
ten over single pictures in diffusers without any, which bounds what sharing a batch can bring on this processor.
Seconds for ten pictures, medians of {rounds} rounds, and in brackets how many times as long as the batch.

| steps | one batch | one by one | `set_adapters` | loading each | no adapter |
|-|-|-|-|-|-|
"""


def kohya_file(folder: Path, base: str = "sd1", number: int = 0) -> tuple[Path, int]:
    """Write a random LoRA for a base, and return its file and the number of its layers."""
    generator, deltas = torch.Generator().manual_seed(number), {}
    endings = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
    for path, shape in layer_shapes(base).items():
        if path.startswith("unet.") and path.endswith(endings):
            down = torch.randn(RANK, *shape[1:], generator=generator) / 50
            up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator) / 50
            deltas[path] = (FactorDelta(LOW_RANK, {"lora_down": down, "lora_up": up}, float(RANK)),)
    file = folder / f"lora{number}.safetensors"
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


def measure_ten(folder: Path, steps: int) -> dict[str, list[float]]:
    """Return the seconds of ten pictures with ten adapters, of each way to draw them."""
    files = [kohya_file(folder, "tiny", number)[0] for number in range(10)]
    base = load_base("tiny")
    prompts = [f"a dog in the snow <lora:{file.stem}:1>" for file in files]
    settings = DrawSettings(steps=steps, batch=10)

    def in_diffusers(pipe: Any, texts: list[str]) -> None:
        pipe(texts, num_inference_steps=steps, guidance_scale=3.0, output_type="pil")

    loaded, bare = load_base("tiny").pipeline(), load_base("tiny").pipeline()
    for pipe in (loaded, bare):
        pipe.set_progress_bar_config(disable=True)
    for file in files:
        loaded.load_lora_weights(file, adapter_name=file.stem)

    def by_set_adapters() -> None:
        for file in files:
            loaded.set_adapters([file.stem])
            in_diffusers(loaded, ["a dog in the snow"])

    def by_loading() -> None:
        for file in files:
            bare.load_lora_weights(file)
            in_diffusers(bare, ["a dog in the snow"])
            bare.unload_lora_weights()

    with Session(base, folder) as session:
        ways: dict[str, Callable[[], Any]] = {
            "one batch": lambda: session.draw(prompts, settings=settings),
            "one by one": lambda: [session.draw(prompt, settings=settings) for prompt in prompts],
            "`set_adapters`": by_set_adapters,
            "loading each": by_loading,
            "no adapter": lambda: [in_diffusers(bare, ["a dog in the snow"]) for _ in files],
            "no adapter, in one batch": lambda: in_diffusers(bare, ["a dog in the snow"] * 10),
        }
        ways["one batch"]()  # reads the files
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, work in ways.items():
                seconds[way].append(timed(work))
    return seconds


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds of a piece of work."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure, and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        modules, seconds = measure(Path(folder))
        ten = {steps: measure_ten(Path(folder), steps) for steps in (4, 25)}
    lines = [HEAD.format(rank=RANK, modules=modules, threads=torch.get_num_threads(), rounds=ROUNDS)]
    for work, (ours, theirs) in seconds.items():
        own, other = statistics.median(ours), statistics.median(theirs)
        lines.append(f"| {work} | {own:.2f} s | {other:.2f} s | {own / other:.2f} |\n")
    lines.append(TEN_HEAD.format(rank=RANK, rounds=ROUNDS))
    for steps, ways in ten.items():
        batch, *others, singles, together = (statistics.median(of_way) for of_way in ways.values())
        cells = [f"{batch:.2f} s", *(f"{other:.2f} s ({other / batch:.1f})" for other in others)]
        lines.append(f"| {steps} | {' | '.join(cells)} | {singles / together:.1f} |\n")
    write_text(PAGE, "".join(lines))


if __name__ == "__main__":
    main()
