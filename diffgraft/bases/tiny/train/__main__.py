"""``python -m diffgraft.bases.tiny.train`` trains the embedded base from scratch; it resumes where it was stopped."""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from diffgraft.bases.loading import TINY, load_base
from diffgraft.bases.tiny.judge import Judge, load_judge
from diffgraft.bases.tiny.train.fit import StagePlan, train_stage
from diffgraft.bases.tiny.train.judging import train_judge
from diffgraft.bases.tiny.train.pool import draw_pool
from diffgraft.bases.tiny.train.text import train_text
from diffgraft.bases.tiny.train.unet import UNetStage, new_scheduler
from diffgraft.bases.tiny.train.vae import train_vae

VAE = StagePlan(steps=4700, batch=24, lr=1e-3, decay=0.42, warmup=60)
JUDGE = StagePlan(steps=8000, batch=64, lr=2e-3, decay=0.6)
TEXT = StagePlan(steps=6000, batch=128, lr=2e-3, decay=0.5, average=0.99, warmup=50)
UNET = StagePlan(steps=12_000, batch=128, lr=1e-3, decay=0.4, average=0.9995, muon=True)


@dataclass(frozen=True)
class Size:
    """Size of a training run: number of drawn pictures, and the training plan of each stage."""

    world: int = 100_000
    """Number of pictures of the tiny world, used to train the autoencoder and the judge."""
    captions: int = 200_000
    """Number of samples of the broad world; the text encoder is trained on their captions."""
    pool: int = 160_000
    """Number of pictures of the broad world, used to train the denoiser."""
    vae: StagePlan = VAE
    judge: StagePlan = JUDGE
    text: StagePlan = TEXT
    unet: StagePlan = UNET

    def dry(self) -> "Size":
        """Return a copy for a dry run: two steps of every stage on 20 pictures."""
        plans = {name: replace(getattr(self, name), steps=2, batch=4) for name in ("vae", "judge", "text", "unet")}
        return replace(self, world=20, captions=20, pool=20, **plans)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all stages that are not finished yet, then write the base to the output folder."""
    parser = argparse.ArgumentParser(prog="python -m diffgraft.bases.tiny.train", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="folder for pictures, caches, checkpoints")
    parser.add_argument("--output", type=Path, default=TINY, help="folder to write the trained base to")
    parser.add_argument("--pool", type=int, default=Size.pool, help="number of pictures to train the denoiser on")
    parser.add_argument("--steps", type=int, default=Size.unet.steps, help="training steps of the denoiser")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads for PyTorch")
    parser.add_argument("--processes", type=int, default=1, help="processes that draw pictures and train the denoiser")
    parser.add_argument(
        "--keep", nargs="*", choices=("vae", "judge"), default=[], help="parts to copy from the shipped base"
    )
    parser.add_argument("--dry-run", action="store_true", help="two steps of every stage on a handful of pictures")
    options = parser.parse_args(arguments)
    size = replace(Size(), pool=options.pool, unet=replace(Size.unet, steps=options.steps))
    if options.dry_run:
        size = size.dry()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)

    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    # unlike diffusers' loader, ours puts no path into the configuration
    vae = load_base("tiny").vae.float().eval() if "vae" in options.keep else train_vae(work, size.world, size.vae)
    judge: Judge = load_judge(TINY / "judge") if "judge" in options.keep else train_judge(work, size.world, size.judge)
    text_encoder = train_text(work, tokenizer, size.captions, size.text)
    z, ids = draw_pool(work, vae, tokenizer, size.pool, options.processes)
    scale = 1 / float(z[:5000].float().std())
    vae.register_to_config(scaling_factor=scale)
    stage = UNetStage((z * scale).half(), ids, text_encoder)
    unet = train_stage(stage, size.unet, work, options.processes)

    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16)
    for name in ("vae", "unet", "text_encoder", "scheduler"):
        shutil.rmtree(options.output / name, ignore_errors=True)
        getattr(pipe, name).save_pretrained(options.output / name)
    pipe.save_config(options.output)
    if options.output.resolve() != TINY.resolve():  # the tokenizer is CLIP's; tokens.py writes its files
        shutil.copytree(TINY / "tokenizer", options.output / "tokenizer", dirs_exist_ok=True)
    (options.output / "judge").mkdir(exist_ok=True)
    halves = {key: value.half() if value.is_floating_point() else value for key, value in judge.state_dict().items()}
    save_file(halves, options.output / "judge" / "judge.safetensors")
    print(json.dumps({"written to": str(options.output), "scaling factor": scale}))


if __name__ == "__main__":
    main()
