"""``python -m diffgraft.bases.tiny.train`` trains the embedded base from scratch; it resumes where it was stopped."""

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from diffgraft.bases.loading import TINY, load_base
from diffgraft.bases.tiny.judge import Judge, load_judge
from diffgraft.bases.tiny.train.fit import StagePlan, fingerprint, train_stage
from diffgraft.bases.tiny.train.judging import train_judge
from diffgraft.bases.tiny.train.pool import draw_pool
from diffgraft.bases.tiny.train.text import train_text
from diffgraft.bases.tiny.train.unet import UNetStage, new_scheduler
from diffgraft.bases.tiny.train.vae import train_vae
from diffgraft.bases.tiny.train.work_folder import positive, prepare, training_parser, with_sentences
from diffgraft.files import atomic_folder, write_safetensors
from diffgraft.third_party import quiet_libraries

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


@with_sentences
def main(arguments: Sequence[str] | None = None) -> None:
    """Run all stages that are not finished yet, then write the base to the output folder."""
    parser = training_parser("diffgraft.bases.tiny.train", __doc__, "runs/tiny", TINY)
    parser.add_argument("--pool", type=positive, default=Size.pool, help="number of pictures to train the denoiser on")
    parser.add_argument("--steps", type=positive, default=Size.unet.steps, help="training steps of the denoiser")
    parser.add_argument("--threads", type=positive, default=1, help="number of CPU threads for PyTorch")
    parser.add_argument(
        "--processes", type=positive, default=1, help="processes that draw pictures and train the denoiser"
    )
    parser.add_argument(
        "--keep", nargs="*", choices=("vae", "judge"), default=[], help="parts to copy from the shipped base"
    )
    options = parser.parse_args(arguments)
    size = replace(Size(), pool=options.pool, unet=replace(Size.unet, steps=options.steps))
    if options.dry_run:
        size = size.dry()
    work, output = prepare(options, TINY)
    torch.set_num_threads(options.threads)

    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    # unlike diffusers' loader, ours puts no path into the configuration
    vae = load_base("tiny").vae.float().eval() if "vae" in options.keep else train_vae(work, size.world, size.vae)
    judge: Judge = load_judge(TINY / "judge") if "judge" in options.keep else train_judge(work, size.world, size.judge)
    text_encoder = train_text(work, tokenizer, size.captions, size.text)
    z, ids = draw_pool(work, vae, tokenizer, size.pool, options.processes)
    scale = 1 / float(z[:5000].float().std())
    vae.register_to_config(scaling_factor=scale)
    inputs = f"{size.pool} pictures, VAE {fingerprint(vae)}, text encoder {fingerprint(text_encoder)}"
    stage = UNetStage((z * scale).half(), ids, text_encoder, inputs)
    unet = train_stage(stage, size.unet, work, options.processes)
    parts = {"vae": vae, "unet": unet, "text_encoder": text_encoder, "tokenizer": tokenizer}
    write_base(parts, judge, output)
    print(json.dumps({"written to": str(output), "scaling factor": scale}))


def write_base(parts: Mapping[str, Any], judge: Judge, output: Path) -> None:
    """Write a base in float16 with its judge to a folder, which keeps its other files and changes as a whole."""
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of diffusers, for a setting that this scheduler does not need
        pipe = StableDiffusionPipeline(
            **parts,
            scheduler=new_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(torch.float16)
        with atomic_folder(output) as partial:
            if output.exists():
                shutil.copytree(output, partial, dirs_exist_ok=True)
            else:  # the tokenizer is CLIP's; tokens.py writes its files
                shutil.copytree(TINY / "tokenizer", partial / "tokenizer")
            for name in ("vae", "unet", "text_encoder", "scheduler"):
                shutil.rmtree(partial / name, ignore_errors=True)
                getattr(pipe, name).save_pretrained(partial / name)
            pipe.save_config(partial)
            state = judge.state_dict()
            halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
            write_safetensors(partial / "judge" / "judge.safetensors", halves, {})


if __name__ == "__main__":
    main()
