"""Memory of a frozen UNet in each precision: ``python -m benchmarks.base_memory`` measures it and prints a table.

UNets of the real configurations with random weights are measured on a processor, each precision in a separate process:
the memory of the UNet, and the peak memory of a training step of LoRA (rank 8 on the attention, latents of 32 × 32,
computed in the precision of the weights). Only linear layers are quantized, so the memory of convolutions stays the
same. It needs 8 GB of memory, 10 GB for XL, and some minutes on one core.
"""

import argparse
import gc
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.scale import _peak, _reset_peak, random_base
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
"""Name → dtype of the weights that are not quantized, and quantization of linear layers"""
SIDE, RANK = 32, 8


def measure(family: str, way: str) -> str:
    """Return the row of the table for one family and precision."""
    dtype, kind = WAYS[way]
    base = quantized(random_base(family).to(dtype=dtype), kind)
    base.vae = base.text_encoder = base.text_encoder_2 = None
    lora = get_method("lora")
    spec = Spec({"unet": choose_layers("unet", base.unet, "attention")}, RANK, RANK, 0, lora.read_options({}))
    live = lora.attach(base, spec)
    config = base.unet.config
    hidden_states = torch.randn(1, 77, config.cross_attention_dim, dtype=dtype)
    more = {}
    if config.addition_embed_type:  # XL: pooled embedding and micro-conditioning
        more = {
            "added_cond_kwargs": {"text_embeds": hidden_states[:, 0, :1280], "time_ids": torch.zeros(1, 6, dtype=dtype)}
        }
    _reset_peak()
    with_unet = _memory()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        noisy = torch.randn(1, 4, SIDE, SIDE, dtype=dtype)
        prediction = base.unet(noisy, torch.tensor([300]), hidden_states, **more).sample
    prediction.float().square().mean().backward()
    peak = _peak()
    del live, prediction
    base.unet = None
    _reset_peak()
    return f"| `{family}` | {way} | {with_unet - _memory():.2f} GB | {peak - _memory():.2f} GB |"


def _memory() -> float:
    """Return the current memory of this process in gigabytes."""
    gc.collect()
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="sd1", choices=["sd1", "sd2", "sdxl"])
    parser.add_argument("--way", choices=WAYS, help="measure only this precision")
    options = parser.parse_args()
    if options.way:
        sys.stdout.write(measure(options.family, options.way) + "\n")
        return
    sys.stdout.write("| UNet | precision | memory | peak in a step |\n|-|-|-|-|\n")
    sys.stdout.flush()
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.base_memory", "--family", options.family, "--way", way]
        # malloc returns freed memory at once, so that the memory of the process is what it uses
        subprocess.run(command, check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"})


if __name__ == "__main__":
    main()
