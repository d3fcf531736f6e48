"""What a frozen UNet takes in each precision: ``python -m benchmarks.base_memory`` measures it and prints a table.

Real configurations with random weights on a processor, each way in a process of its own: the memory the process holds
for the UNet, and the most that a training step of LoRA holds (rank 8 on the attention, a latent of 32 × 32, arithmetic
in the precision of the weights). Linear layers alone are quantised; what convolutions take stays. It needs 8 GB of
memory, 10 GB for XL, and some minutes on one core.
"""

import argparse
import gc
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.scale import _forget_peak, _peak, random_base
from diffgraft.adapters.method import Spec
from diffgraft.adapters.registry import get_method
from diffgraft.bases.layers import choose_layers
from diffgraft.bases.quantize import quantized
from diffgraft.bases.quantized import Quantize

WAYS: dict[str, tuple[torch.dtype, Quantize]] = {
    "float32": (torch.float32, "none"),
    "bfloat16": (torch.bfloat16, "none"),
    "int8": (torch.bfloat16, "int8"),
    "nf4": (torch.bfloat16, "nf4"),
}
"""Name → precision of what is not quantised, and how linear layers are held"""
SIDE, RANK = 32, 8


def measure(family: str, way: str) -> str:
    """A line of the table."""
    dtype, kind = WAYS[way]
    base = quantized(random_base(family).to(dtype=dtype), kind)
    base.vae = base.text_encoder = base.text_encoder_2 = None
    lora = get_method("lora")
    spec = Spec({"unet": choose_layers("unet", base.unet, "attention")}, RANK, RANK, 0, lora.read_options({}))
    live = lora.attach(base, spec)
    config = base.unet.config
    told = torch.randn(1, 77, config.cross_attention_dim, dtype=dtype)
    more = {}
    if config.addition_embed_type:  # of XL: the pooled embedding, and sizes
        more = {"added_cond_kwargs": {"text_embeds": told[:, 0, :1280], "time_ids": torch.zeros(1, 6, dtype=dtype)}}
    _forget_peak()
    with_unet = _held()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        noisy = torch.randn(1, 4, SIDE, SIDE, dtype=dtype)
        said = base.unet(noisy, torch.tensor([300]), told, **more).sample
    said.float().square().mean().backward()
    peak = _peak()
    del live, said
    base.unet = None
    _forget_peak()
    return f"| `{family}` | {way} | {with_unet - _held():.2f} GB | {peak - _held():.2f} GB |"


def _held() -> float:
    """What this process holds now, in gigabytes."""
    gc.collect()
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="sd1", choices=["sd1", "sd2", "sdxl"])
    parser.add_argument("--way", choices=WAYS, help="only this one")
    asked = parser.parse_args()
    if asked.way:
        sys.stdout.write(measure(asked.family, asked.way) + "\n")
        return
    sys.stdout.write("| UNet of | held in | memory | the most in a step |\n|-|-|-|-|\n")
    sys.stdout.flush()
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.base_memory", "--family", asked.family, "--way", way]
        # what is freed is given back at once, so that what is held is what is used
        subprocess.run(command, check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"})


if __name__ == "__main__":
    main()
