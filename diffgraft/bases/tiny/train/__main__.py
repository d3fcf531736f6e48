"""``python -m diffgraft.bases.tiny.train``: the embedded base from nothing; stop it and start it at will."""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.train.fit import Plan
from diffgraft.bases.tiny.train.judging import train_judge
from diffgraft.bases.tiny.train.pictures import pictures
from diffgraft.bases.tiny.train.text import captions, text_states, train_text
from diffgraft.bases.tiny.train.unet import latents, new_scheduler, train_unet
from diffgraft.bases.tiny.train.vae import train_vae

VAE = Plan(steps=4700, batch=24, lr=1e-3, decay=0.42, warmup=60)
JUDGE = Plan(steps=8000, batch=64, lr=2e-3, decay=0.6)
TEXT = Plan(steps=1500, batch=128, lr=2e-3, decay=0.5, average=0.99, warmup=50)
UNET = Plan(steps=14000, batch=64, lr=1e-3, decay=0.4, average=0.9995, muon=True)


def main() -> None:
    """Run all stages that are not done yet and write the base's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="folder for pictures, caches, checkpoints")
    parser.add_argument("--output", type=Path, default=TINY, help="folder the finished base is written to")
    parser.add_argument("--pictures", type=int, default=100_000, help="pictures of the world to draw")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="processor threads")
    options = parser.parse_args()
    work, count = options.work, options.pictures
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)

    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    vae = train_vae(work, count, VAE)
    judge = train_judge(work, count, JUDGE)
    text_encoder = train_text(work, tokenizer, count, TEXT)
    ids, _ = captions(work, tokenizer, count)
    states = text_states(work, text_encoder, ids)
    with torch.no_grad():
        nothing = tokenizer([""], padding="max_length", return_tensors="pt").input_ids
        empty = text_encoder(input_ids=nothing).last_hidden_state[0]
    z = latents(work, vae, pictures(work, "world", count))
    scale = 1 / float(z[:5000].float().std())
    vae.register_to_config(scaling_factor=scale)
    unet = train_unet(work, (z * scale).half(), states, empty, UNET)

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
    if options.output.resolve() != TINY.resolve():  # the tokenizer is CLIP's; see tokens.py for where it comes from
        shutil.copytree(TINY / "tokenizer", options.output / "tokenizer", dirs_exist_ok=True)
    (options.output / "judge").mkdir(exist_ok=True)
    halves = {key: value.half() if value.is_floating_point() else value for key, value in judge.state_dict().items()}
    save_file(halves, options.output / "judge" / "judge.safetensors")
    print(json.dumps({"written to": str(options.output), "scaling factor": scale}))


if __name__ == "__main__":
    main()
