"""Every method on bases of real size: ``python -m benchmarks.scale`` measures them and writes the page.

For each family, a base of the real configuration with random weights is written as a single file and loaded. Every
method of the registry is attached to it, takes a step, gets random values, and is saved, read and grafted. Each family
is measured in a separate process. It takes 24 GB of memory, 10 GB of disk and a quarter of an hour on two cores.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffgraft.adapters.method import Method, Spec
from diffgraft.adapters.registry import methods
from diffgraft.bases import Base, load_base
from diffgraft.bases.layers import choose_layers, parts_of
from diffgraft.bases.ldm_keys import ldm_state_dict
from diffgraft.bases.loading import CONFIGS, TINY
from diffgraft.bases.registry import families
from diffgraft.bases.unet import unet_arguments
from diffgraft.files import write_safetensors, write_text
from diffgraft.generation.graft import graft
from diffgraft.third_party import quiet_libraries

PAGE = Path(__file__).parent / "results" / "scale.md"
SIZES = {"sd1": torch.float32, "sd2": torch.float32, "sdxl": torch.bfloat16}
"""Family → dtype of the weights; XL in float32 would not fit into 24 GB together with an adapter"""
SIDE = 16
"""Height and width of the latents"""
RANK = 4
HEAD = """# Every method on bases of real size

`python -m benchmarks.scale` wrote this page; `pytest -m scale` measures the same and checks it. Bases of the real
configurations with random weights are written as single files and loaded again. On each base, every method takes one
step (forward and backward, latents of {side} × {side}, rank {rank}, text encoders included), is saved, read and
grafted. *Error* is the relative difference between the UNet's outputs with the grafted and with the attached adapter;
it is due to rounding. Afterwards the base's weights are the same bits as before. Memory is the peak of the process,
including the base. On XL, `full` trains only one text encoder, because all weights in bfloat16, a copy of them in
float32 and their gradients would take 35 GB.

"""


@dataclass(frozen=True)
class Row:
    """Figures of one method on one base."""

    family: str
    method: str
    layers: str
    modules: int
    parameters: int
    """Number of trainable parameters"""
    megabytes: float
    """Size of the adapter file"""
    gigabytes: float
    """Peak memory of the process"""
    off: float
    """‖grafted − attached‖ / ‖attached‖, of the UNet's outputs"""
    changed: float
    """‖attached − without adapter‖ / ‖without adapter‖ of the UNet's outputs, with random values in the adapter"""
    restored: bool
    """Whether the base's weights are the same bits after the graft as before"""


@dataclass(frozen=True)
class Loaded:
    """Figures of a base that was loaded from a single file."""

    family: str
    parameters: int
    file_gigabytes: float
    seconds: float
    gigabytes: float


def random_file(family: str, folder: Path) -> Path:
    """Write a single-file checkpoint of the family's real configuration with random weights, and return its path."""
    base = random_base(family)
    path = folder / f"{family}.safetensors"
    write_safetensors(path, {name: value.contiguous() for name, value in ldm_state_dict(base).items()}, {})
    return path


def random_base(family: str) -> Base:
    """Return a base of the family's real configuration with random weights, in the dtype of `SIZES`."""
    with quiet_libraries():
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder, before = CONFIGS / family, torch.get_default_dtype()
    read = {part: json.loads((folder / part / "config.json").read_text("utf-8")) for part in ("unet", "vae")}
    torch.manual_seed(0)
    torch.set_default_dtype(SIZES[family])
    try:
        parts = {"unet": UNet2DConditionModel.from_config(read["unet"])}
        parts["vae"] = AutoencoderKL.from_config(read["vae"])
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        for part, kind in kinds.items():
            if part in families()[family].single_file_prefixes:
                parts[part] = kind(CLIPTextConfig.from_pretrained(folder / part))
                parts[part.replace("text_encoder", "tokenizer")] = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    finally:
        torch.set_default_dtype(before)
    return Base(name=family, family=families()[family], scheduler=DDIMScheduler(), **parts)


def measure(family: str, file: Path) -> Iterator[Loaded | Row]:
    """Load the base from `file` and yield its figures, then those of every method on it.

    Raises:
        AssertionError: the file was read as another family.
    """
    _reset_peak()
    start = time.perf_counter()
    base = load_base(file, SIZES[family])
    took = time.perf_counter() - start
    assert base.family.name == family
    numbers = sum(value.numel() for _, part in base.parts() for value in part.parameters())
    yield Loaded(family, numbers, file.stat().st_size / 1e9, took, _peak())
    for method in (own for own in methods().values() if not own.needs_conditions):
        yield _one(base, method, file.parent)


def _one(base: Base, method: Method, folder: Path) -> Row:
    options = method.read_options({})
    layers = method.layers_under(options)
    paths = {part: choose_layers(part, module, layers) for part, module in parts_of(base).items()}
    if method.name == "full" and base.family.name == "sdxl":
        layers = "all of the second text encoder"
        paths = {"text_encoder_2": paths["text_encoder_2"]}
    _reset_peak()
    bare, checksums = _predict(base, ["a dog", "a cat"]), _bits(base)
    live = method.attach(base, Spec(paths, RANK, RANK, 0, options, trigger="<zorp>", noun="dog"))
    prompts = ["a <zorp>", "a cat"]
    _predict(base, prompts, with_grad=True).float().square().mean().backward()
    trained = live.trainable()
    assert any(value.grad is not None and value.grad.abs().max() > 0 for value in trained.values())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in trained.values():
            value.grad = None
            spread = value.float().std().nan_to_num() if value.numel() > 1 else value.abs().float()
            value.add_((0.3 * spread + 0.01) * torch.randn(value.shape, generator=generator).to(value.dtype))
    numbers = sum(value.numel() for value in trained.values())
    expected = _predict(base, prompts)
    changed = _relative(expected - bare, bare)
    adapter = live.adapter({"method": method.name, "trigger": "<zorp>", "base": {"family": base.family.name}})
    live.detach()
    file = adapter.save(folder / f"{method.name}.safetensors")
    modules, size = len(adapter.modules), file.stat().st_size / 1e6
    del adapter, live, trained
    with graft(base, {file: 1.0}):
        off = _relative(_predict(base, prompts) - expected, expected)
    file.unlink()
    restored = _bits(base) == checksums and torch.equal(_predict(base, ["a dog", "a cat"]), bare)
    name = base.family.name
    return Row(name, method.name, layers, modules, numbers, size, _peak(), off, changed, restored)


def _predict(base: Base, prompts: list[str], with_grad: bool = False) -> Tensor:
    dtype = SIZES[base.family.name]
    # bfloat16 under autocast, as in training
    with torch.set_grad_enabled(with_grad), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        x = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(dtype)
        arguments = unet_arguments(base.condition(prompts, (8 * SIDE, 8 * SIDE)))
        prediction: Tensor = base.unet(x, torch.tensor([300, 700]), **arguments).sample
    return prediction


def _relative(difference: Tensor, whole: Tensor) -> float:
    return float(difference.float().norm() / whole.float().norm())


def _bits(base: Base) -> list[int]:
    """Return a checksum of the bits of each parameter."""
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return [
        int(value.view(whole[value.dtype]).sum(dtype=torch.int64))
        for _, part in base.parts()
        for value in part.parameters()
    ]


def _reset_peak() -> None:
    """Release free memory, and reset the peak memory that Linux records for this process."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """Return the peak memory of this process since `_reset_peak`, in gigabytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def page(loaded: list[Loaded], rows: list[Row]) -> str:
    """Return the page as Markdown."""
    text = HEAD.format(side=SIDE, rank=RANK)
    text += "| base | parameters | file | precision | loading time | memory |\n|-|-|-|-|-|-|\n"
    for base in loaded:
        dtype = str(SIZES[base.family]).removeprefix("torch.")
        text += f"| `{base.family}` | {base.parameters / 1e6:,.0f} M | {base.file_gigabytes:.1f} GB | {dtype} | "
        text += f"{base.seconds:.0f} s | {base.gigabytes:.1f} GB |\n"
    text += "\n| base | method | layers | modules | trainable parameters | file | memory | error |\n"
    text += "|-|-|-|-|-|-|-|-|\n"
    for row in rows:
        text += f"| `{row.family}` | `{row.method}` | {row.layers} | {row.modules:,} | {row.parameters / 1e6:,.2f} M | "
        text += f"{row.megabytes:,.1f} MB | {row.gigabytes:.1f} GB | {row.off:.0e} |\n"
    return text


def _child(family: str) -> None:
    """Measure one family, and print a line of JSON for the base and for each method."""
    with tempfile.TemporaryDirectory() as folder:
        for figures in measure(family, random_file(family, Path(folder))):
            sys.stdout.write(json.dumps(asdict(figures)) + "\n")
            sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=SIZES, help="measure only this family, and print its figures as JSON")
    family = parser.parse_args().family
    if family:
        _child(family)
        return
    loaded, rows = [], []
    for name in tqdm(SIZES, "families"):
        command = [sys.executable, "-m", "benchmarks.scale", "--family", name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                figures = json.loads(line)
                if "method" in figures:
                    rows.append(Row(**figures))
                else:
                    loaded.append(Loaded(**figures))
        if child.returncode:
            raise SystemExit(f"The process for {name} ended with exit status {child.returncode}.")
    write_text(PAGE, page(loaded, rows))


if __name__ == "__main__":
    main()
