"""Train a LoRA in a plain loop, with the library's own functions; to be read from top to bottom.

    python examples/minimal.py            # 200 steps on the embedded base `tiny`; about half a minute on two cores
    python examples/minimal.py 20 out/    # 20 steps, results in the folder out/

`diffgraft train` does the same and adds class images, checkpoints, samples, validation and several GPUs. This example
contains only what a training step consists of. Shapes are in brackets: n pictures, c channels, h × w latents.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffgraft.adapters.method import Spec
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.data.image_folder import read_folder
from diffgraft.data.latents import Latents, encode
from diffgraft.demo.subject import POODLE
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.generation.session import Session
from diffgraft.rng import normal, permutation

PROMPT = "a sks dog"
"""Prompt of the trigger `sks`, a rare word that will mean this dog, and the class noun"""
SEED, BATCH, RANK, LEARNING_RATE = 0, 4, 8, 1.5e-3
SAMPLE_VAE, EVALUATE = 1, 99
"""Streams of random numbers; every number is a function of seed, place and stream (`diffgraft.rng`)"""


class Result(NamedTuple):
    """Losses and files of a training run."""

    before: float
    """Loss at fixed noise and timesteps before training"""
    after: float
    """The same loss after training"""
    adapter: Path
    picture: Path


def batch_loss(base: Base, process: ForwardProcess, latents: Tensor, places: list[tuple[int, ...]]) -> Tensor:
    """Mean loss of clean `latents` [n, c, h, w], a scalar; `places` seed noise and timestep of each picture."""
    noisy, target, timesteps = process.at_places(latents, places)  # x_t [n, c, h, w], ε or v of that shape, [n]
    with torch.no_grad():  # the text encoder is frozen
        conditioning = base.condition([PROMPT] * len(latents))
    prediction = base.denoise(noisy, timesteps, conditioning)  # [n, c, h, w]
    return process.loss_per_sample(prediction, target, timesteps).mean()


@torch.no_grad()
def fixed_loss(base: Base, process: ForwardProcess, latents: Latents) -> float:
    """Mean loss over all pictures, each with 8 pairs of noise and timestep that are the same in every call."""
    means = torch.stack([latents[row][0] for row in range(len(latents))])
    losses = [
        batch_loss(base, process, means, [(SEED, EVALUATE, turn, row) for row in range(len(means))])
        for turn in range(8)
    ]
    return float(torch.stack(losses).mean())


def main(steps: int = 200, folder: Path = Path("runs/minimal")) -> Result:
    """Train a LoRA on the demo's five pictures, save it, load it again, and generate a picture with it."""
    folder.mkdir(parents=True, exist_ok=True)

    # The frozen base: denoiser, text encoder, VAE and noise schedule. Its family knows what the denoiser predicts.
    base = load_base("tiny")
    process = ForwardProcess(base.parameterization)

    # Pictures → latents: mean and standard deviation [c, h, w] of the VAE's distribution for each picture.
    pictures = [picture.image for picture in read_folder(POODLE.folder / "learn")]
    latents = encode(base, pictures, side=base.resolution)

    # Attach the LoRA: forward hooks on the attention layers. The base's own weights never change.
    lora = get_method("lora")
    part = base.family.denoiser
    layers = {part: choose_layers(part, base.denoiser, "attention")}
    attached = lora.attach(base, Spec(layers, rank=RANK, alpha=RANK, seed=SEED, options=lora.read_options({})))
    optimizer = torch.optim.AdamW(attached.trainable().values(), lr=LEARNING_RATE)
    before = fixed_loss(base, process, latents)

    for step in range(steps):
        places = range(step * BATCH, (step + 1) * BATCH)
        # Epochs over the pictures, each in a different order.
        rows = [permutation(len(latents), SEED, place // len(latents))[place % len(latents)] for place in places]
        spread = torch.stack([normal(latents.shape(0), SEED, place, SAMPLE_VAE) for place in places])
        clean = latents.sample(rows, spread)  # [n, c, h, w]
        loss = batch_loss(base, process, clean, [(SEED, place) for place in places])
        loss.backward()
        optimizer.step()
        attached.after_step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    # The adapter in memory: module paths → deltas. Reading, converting or combining its file needs no base.
    after = fixed_loss(base, process, latents)
    made_for = {"name": base.name, "family": base.family.name, "hash": base.hash}
    adapter = attached.adapter({"method": "lora", "trigger": "sks", "rank": RANK, "alpha": RANK, "base": made_for})
    attached.detach()  # the base is unchanged again
    file = adapter.save(folder / "adapter.safetensors")

    # Generate a picture. Within the block the adapter is merged into the weights; afterwards they are restored exactly.
    with Session(base) as session:
        session.use(file)
        (picture,) = session.draw(f"{PROMPT} in the snow", seeds=[7])
    picture.save(folder / "snow.png")
    print(f"loss at fixed noise: {before:.3f} → {after:.3f}; wrote {file} and {folder / 'snow.png'}")
    return Result(before, after, file, folder / "snow.png")


if __name__ == "__main__":
    main(*(convert(word) for convert, word in zip((int, Path), sys.argv[1:], strict=False)))
