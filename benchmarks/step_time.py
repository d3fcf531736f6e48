"""What a training step costs: ``python -m benchmarks.step_time`` times every method on Stable Diffusion 1.5's UNet.

The real configuration with random weights, in float32. A step is a forward and a backward pass; the floor is the
frozen UNet alone, back to its input. Peers run at the same layers, rank and alpha: peft's layers, and lycoris-lora's in
both of its modes. All cases take turns in one process, and each round's times are divided by the floor's of that round;
peak memory is of a process of its own for each case (``--memory``).
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from diffgraft.adapters.method import Spec, choose_layers, get_method
from diffgraft.bases.loading import CONFIGS
from diffgraft.files import write_text

RANK = 8
CASES = {
    "floor": ("", "", {}),
    "lora": ("ours", "lora", {}),
    "lora, peft": ("peft", "lora", {}),
    "locon": ("ours", "locon", {}),
    "locon, peft": ("peft", "locon", {}),
    "locon, lycoris": ("lycoris", "locon", {"bypass_mode": True}),
    "loha": ("ours", "loha", {}),
    "loha, peft": ("peft", "loha", {}),
    "loha, lycoris": ("lycoris", "loha", {}),
    "loha, lycoris bypass": ("lycoris", "loha", {"bypass_mode": True}),
    "lokr": ("ours", "lokr", {}),
    "lokr, peft": ("peft", "lokr", {}),
    "lokr, lycoris": ("lycoris", "lokr", {}),
    "lokr, lycoris bypass": ("lycoris", "lokr", {"bypass_mode": True}),
    "hypernetwork": ("ours", "hypernetwork", {}),
}
"""Name → whose code, method, and what is set on it."""


def new_unet() -> Any:
    """Stable Diffusion 1.5's UNet with random weights, frozen."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = json.loads((CONFIGS / "sd1" / "unet" / "config.json").read_text("utf-8"))
    return UNet2DConditionModel.from_config(config).requires_grad_(False)


@contextmanager
def attached(unet: nn.Module, whose: str, method: str, options: dict[str, Any]) -> Iterator[list[nn.Parameter]]:
    """`method` on the UNet for the length of the block; what trains is handed out."""
    if not method:
        yield []
        return
    paths = choose_layers("unet", unet, get_method(method).layers)
    if whose == "ours":
        chosen = get_method(method)
        spec = Spec({"unet": paths}, RANK, float(RANK), 0, chosen.read_options(options))
        live = chosen.attach(SimpleNamespace(unet=unet), spec)
        yield list(live.trainable().values())
        live.detach()
    elif whose == "peft":
        tuner = _peft(unet, method, paths)
        yield [value for value in unet.parameters() if value.requires_grad]
        tuner.unload()
        unet.requires_grad_(False)
    else:
        modules = _lycoris(unet, method, paths, options)
        yield [value for module in modules for value in module.parameters()]
        for module in modules:
            module.restore()


def _peft(unet: nn.Module, method: str, paths: list[str]) -> Any:
    from peft import LoHaConfig, LoKrConfig, LoraConfig
    from peft.tuners.loha import LoHaModel
    from peft.tuners.lokr import LoKrModel
    from peft.tuners.lora import LoraModel

    if method in ("lora", "locon"):
        return LoraModel(unet, {"x": LoraConfig(r=RANK, lora_alpha=RANK, target_modules=paths)}, "x")
    if method == "loha":
        return LoHaModel(unet, {"x": LoHaConfig(r=RANK, alpha=RANK, target_modules=paths)}, "x")
    return LoKrModel(unet, {"x": LoKrConfig(r=RANK, alpha=RANK, target_modules=paths)}, "x")


def _lycoris(unet: nn.Module, method: str, paths: list[str], options: dict[str, Any]) -> list[Any]:
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    kind = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}[method]
    modules = []
    for path in paths:
        module = kind(path.replace(".", "_"), unet.get_submodule(path), 1.0, RANK, RANK, **options)
        module.apply_to()
        modules.append(module)
    return modules


def new_step(unet: Any, side: int, batch: int) -> Callable[[list[nn.Parameter]], float]:
    """A function that runs one step and says how many seconds it took."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, side, side, generator=generator)
    states = torch.randn(batch, 77, 768, generator=generator)
    times = torch.randint(0, 1000, (batch,), generator=generator)

    def step(trainable: list[nn.Parameter]) -> float:
        given = x.clone().requires_grad_(not trainable)
        start = time.perf_counter()
        unet(given, times, states).sample.square().mean().backward()
        seconds = time.perf_counter() - start
        for value in trainable:
            value.grad = None
        return seconds

    return step


def measure(names: list[str], side: int, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a step, and the median of its ratio to the floor of the same round, for each case."""
    unet = new_unet()
    step = new_step(unet, side, batch)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=rounds * len(names), desc="steps", leave=False) as bar:
        for _ in range(rounds):
            for name in names:
                with attached(unet, *CASES[name]) as trainable:
                    step(trainable)
                    seconds[name].append(min(step(trainable), step(trainable)))
                gc.collect()
                bar.update()
            for name in names:
                ratios[name].append(seconds[name][-1] / seconds["floor"][-1])
    return {
        name: {"seconds": statistics.median(seconds[name]), "ratio": statistics.median(ratios[name])} for name in names
    }


def peak_memory(name: str, side: int, batch: int) -> float:
    """Gigabytes at the peak of a process that runs two steps of one case."""
    command = [sys.executable, "-m", "benchmarks.step_time", "--one", name, "--side", str(side), "--batch", str(batch)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(said.strip().splitlines()[-1])


def main() -> None:
    """Print the table; ``--json FILE`` keeps the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=32, help="side of the latents; pictures are eight times as wide")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well, in processes of their own")
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one:
        unet = new_unet()
        step = new_step(unet, options.side, options.batch)
        with attached(unet, *CASES[options.one]) as trainable:
            step(trainable)
            step(trainable)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return
    names = ["floor", *(name for name in options.only if name != "floor")]
    found = measure(names, options.side, options.batch, options.rounds)
    if options.memory:
        for name in tqdm(names, "memory", leave=False):
            found[name]["GB"] = peak_memory(name, options.side, options.batch)
    print("| case | seconds | of the floor | peak memory |\n|-|-|-|-|")
    for name, row in found.items():
        memory = f"{row['GB']:.1f} GB" if "GB" in row else "–"
        print(f"| {name} | {row['seconds']:.2f} | {row['ratio']:.2f} | {memory} |")
    if options.json:
        setting = {"side": options.side, "batch": options.batch, "rank": RANK, "threads": torch.get_num_threads()}
        write_text(options.json, json.dumps({"setting": setting, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
