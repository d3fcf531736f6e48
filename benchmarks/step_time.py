"""Cost of a training step: ``python -m benchmarks.step_time`` times every method on Stable Diffusion 1.5's UNet.

The UNet has the real configuration with random weights in float32. A step is a forward and a backward pass; the floor
is a step of the frozen UNet without an adapter, with gradients for its input. For comparison, peft and both modes of
lycoris-lora run with the same layers, rank and alpha. Because the speed of a machine changes from minute to minute,
steps of the floor alternate with those of a case, and the ratio is that of the fastest step of each. Peak memory is
measured in a separate process for each case. It takes more than an hour on two cores, which should be idle otherwise.
"""

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from diffgraft.adapters.method import Spec
from diffgraft.adapters.registry import get_method
from diffgraft.bases.layers import choose_layers
from diffgraft.bases.loading import CONFIGS
from diffgraft.files import atomic_write, write_text

RANK = 8
SLOW = 2.5
"""Ratio to the floor from which one step is enough; such slow cases need no precise figure"""
RESULTS = Path(__file__).parent / "results"
HEAD = """# Cost of a training step

`python -m benchmarks.step_time` wrote this page: one step (forward and backward) of Stable Diffusion 1.5's UNet, the
real configuration with random weights in float32, on {threads} threads of a processor. The *floor* is a step of the
frozen UNet without an adapter, with gradients for its input. For comparison, peft and lycoris-lora run with the same
layers, rank {rank} and alpha; *bypass* is the mode of lycoris-lora that never builds the matrix. Steps of the floor
alternate with the steps of a case, and the ratio is that of the fastest step of each; the ratio in the row *floor*
itself shows how precise this is. Compare the ratios, not the seconds, because the speed of the machine changes from
minute to minute. Peak memory is measured in a separate process for each case.

![Time of a training step, as a multiple of the frozen UNet's](../pictures/step-time.png)
"""


@dataclass(frozen=True)
class Setting:
    """Size of the step, and number of measurements."""

    side: int
    """Height and width of the latents; pictures are eight times as large"""
    batch: int
    rounds: int
    """Number of rounds over all cases; the result is the median"""
    steps: int
    """Number of steps of the case and of the floor in each round, in turns; the fastest count"""
    memory: bool

    @property
    def name(self) -> str:
        return f"{self.side} x {self.side}, batch {self.batch}"


SETTINGS = {setting.name: setting for setting in (Setting(32, 1, 5, 4, True), Setting(64, 2, 1, 4, False))}
CASES = {
    "floor": ("", "", {}),
    "lora": ("ours", "lora", {}),
    "lora, peft": ("peft", "lora", {}),
    "lora, lycoris": ("lycoris", "lora", {"bypass_mode": True}),
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
    "full": ("ours", "full", {}),
}
"""Name → implementation (`ours` is diffgraft), method, and options."""


def new_unet() -> Any:
    """Return Stable Diffusion 1.5's UNet with random weights, frozen."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = json.loads((CONFIGS / "sd1" / "unet" / "config.json").read_text("utf-8"))
    return UNet2DConditionModel.from_config(config).requires_grad_(False)


@contextmanager
def attached(unet: nn.Module, whose: str, method: str, options: dict[str, Any]) -> Iterator[list[nn.Parameter]]:
    """Attach `method` to the UNet within the block, and yield the trainable parameters."""
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

    kind = {"lora": LoConModule, "locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}[method]
    modules = []
    for path in paths:
        module = kind(path.replace(".", "_"), unet.get_submodule(path), 1.0, RANK, RANK, **options)
        module.apply_to()
        modules.append(module)
    return modules


def new_step(side: int, batch: int) -> Callable[[Any, list[nn.Parameter]], float]:
    """Return a function that runs one step of a UNet and returns its seconds."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, side, side, generator=generator)
    states = torch.randn(batch, 77, 768, generator=generator)
    times = torch.randint(0, 1000, (batch,), generator=generator)

    def step(unet: Any, trainable: list[nn.Parameter]) -> float:
        noisy = x.clone().requires_grad_(not trainable)
        start = time.perf_counter()
        unet(noisy, times, states).sample.square().mean().backward()
        seconds = time.perf_counter() - start
        for value in trainable:
            value.grad = None
        return seconds

    return step


def measure(names: list[str], setting: Setting) -> dict[str, dict[str, float]]:
    """Return `seconds` of the fastest step of each case, and its `ratio` to the floor."""
    bare, unet = new_unet(), new_unet()
    step = new_step(setting.side, setting.batch)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=setting.rounds * len(names), desc=setting.name, leave=False) as bar:
        for _ in range(setting.rounds):
            for name in names:
                if not ratios[name] or ratios[name][0] < SLOW:
                    own, floor = one_turn(bare, unet, name, step, setting.steps)
                    seconds[name].append(own)
                    ratios[name].append(own / floor)
                bar.update()
    return {name: {"seconds": min(seconds[name]), "ratio": statistics.median(ratios[name])} for name in names}


def one_turn(bare: Any, unet: Any, name: str, step: Callable[..., float], steps: int) -> tuple[float, float]:
    """Return the seconds of the fastest step of a case, and of the fastest step of the floor in between."""
    gc.collect()
    own, floor = [], []
    with attached(unet, *CASES[name]) as trainable:
        for _ in range(steps):
            floor.append(step(bare, []))
            own.append(step(unet, trainable))
            if own[0] > SLOW * floor[0]:
                break
    return min(own), min(floor)


def peak_memory(name: str, setting: Setting) -> float:
    """Return the peak memory in gigabytes of a process that runs two steps of one case."""
    command = [sys.executable, "-m", "benchmarks.step_time", "--one", name, setting.name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def run_one(name: str, setting: Setting) -> None:
    """Run two steps of one case, and print the peak memory of this process in gigabytes on the last line.

    The peak is read from ``/proc``, because that of `getrusage` includes the peak of the parent process.
    """
    unet = new_unet()
    step = new_step(setting.side, setting.batch)
    with attached(unet, *CASES[name]) as trainable:
        step(unet, trainable)
        step(unet, trainable)
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    assert peak is not None
    print(int(peak[1]) * 1024 / 1e9)


def table(found: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table with a row for each case."""
    lines = ["| | seconds | ratio to floor | peak memory |", "|-|-|-|-|"]
    for name, row in found.items():
        memory = f"{row['GB']:.1f} GB" if "GB" in row else "–"
        lines.append(f"| {name} | {row['seconds']:.2f} | {row['ratio']:.2f} | {memory} |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Plot the ratios to the floor as bars on a logarithmic axis from 1, with a panel for each setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(found), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (setting, cases) in zip(panels, found.items(), strict=True):
        names = [name for name in cases if name != "floor"]
        ratios = [cases[name]["ratio"] for name in names]
        colours = ["tab:blue" if CASES[name][0] == "ours" else "tab:gray" for name in names]
        bars = axes.barh(names, [max(ratio - 1, 0) for ratio in ratios], left=1, color=colours)
        axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=8)
        axes.set(xscale="log", xlim=(1, 1.6 * max(ratios)), xlabel="time of the frozen UNet alone", title=setting)
        axes.set_xticks([1, 2, 4, 8], ["1 ×", "2 ×", "4 ×", "8 ×"], minor=False)
        axes.minorticks_off()
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)


def write_page(found: dict[str, Any], folder: Path) -> None:
    """Write ``step-time.json``, ``step-time.md`` and the plot."""
    write_text(folder / "step-time.json", json.dumps(found, indent=1) + "\n")
    plot(found["settings"], folder.parent / "pictures" / "step-time.png")
    parts = [HEAD.format(threads=found["threads"], rank=found["rank"])]
    parts += [f"## {name}\n\n{table(cases)}" for name, cases in found["settings"].items()]
    write_text(folder / "step-time.md", "\n".join(parts))


def main() -> None:
    """Measure every setting and write the page; with ``--only``, measure some cases again and replace their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="measure only these cases again, and the floor")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options.one[0], SETTINGS[options.one[1]])
        return
    names = ["floor", *(name for name in options.only or CASES if name != "floor")]
    record = RESULTS / "step-time.json"
    if options.only and record.exists():
        found = json.loads(record.read_text("utf-8"))
    else:
        found = {"rank": RANK, "threads": torch.get_num_threads(), "settings": {key: {} for key in SETTINGS}}
    for key, setting in SETTINGS.items():
        cases = measure(names, setting)
        if setting.memory:
            for name in tqdm(names, "memory", leave=False):
                cases[name]["GB"] = peak_memory(name, setting)
        print(f"{key}\n\n{table(cases)}", flush=True)
        held = found["settings"][key]
        held |= {name: row for name, row in cases.items() if name not in held or name in (options.only or CASES)}
    write_page(found, RESULTS)


if __name__ == "__main__":
    main()
