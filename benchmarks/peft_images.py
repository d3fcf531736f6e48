"""peft's benchmark of image generation, with methods of diffgraft: ``python -m benchmarks.peft_images PEFT``.

PEFT is a clone of github.com/huggingface/peft, whose method_comparison/image-gen holds the settings: a base (FLUX.2
klein 4B), a data set on the hub with a prompt for each picture, the split, steps, learning rate, and the prompts that
tell drift. Each ``--method NAME:KEY=VALUE,…`` is trained by these settings, and measured as peft measures: *similarity*
is the mean cosine of DINOv2's embeddings of the test pictures and of pictures drawn from their prompts, three of each;
*drift* is one minus the mean cosine of pictures drawn with and without the adapter. Unlike peft's table, a row has as
many seeds as asked for, and their spread.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import diffgraft as dg
from diffgraft.bases import Base
from diffgraft.data.data_sets import from_data_set
from diffgraft.devices import device_of
from diffgraft.errors import DiffgraftError
from diffgraft.evaluation.encoders import Encoder, load_encoder
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings

SETTINGS = Path("method_comparison/image-gen/default_training_params.json")
REPEATS = 3
_TEST_SEED, _DRIFT_SEED = 100_000, 100_000_000
"""First seeds of pictures that are compared with test pictures, and with those of the base"""
Pairs = Sequence[tuple[Image.Image, str]]


@dataclass(frozen=True)
class Task:
    """The task of the benchmark."""

    settings: dict[str, Any]
    """Contents of peft's file of settings"""
    train: Pairs
    test: Pairs

    def drawn(self, session: Session, prompts: Sequence[str], first_seed: int) -> list[Image.Image]:
        """Draw a picture for each prompt, with the settings of the task."""
        side, wanted = self.settings["resolution"], self.settings
        how = DrawSettings(steps=wanted["num_inference_steps"], guidance=wanted["guidance_scale"], size=(side, side))
        return session.draw_each(prompts, [first_seed + number for number in range(len(prompts))], how)


def read_task(peft: Path, pictures: Sequence[Image.Image] | None = None, **changes: Any) -> Task:
    """Read the settings, and split the pictures as peft does, after a shuffle by NumPy's seed 0.

    Args:
        peft: clone of peft's repository.
        pictures: pictures instead of those of the data set.
        changes: settings instead of those of the file.

    Raises:
        DiffgraftError: there are no such settings, or not a prompt for each picture.
    """
    path = peft / SETTINGS
    if not path.is_file():
        raise DiffgraftError(f"There is no {path}: give a clone of github.com/huggingface/peft.")
    settings = {**json.loads(path.read_text("utf-8")), **changes}
    if pictures is None:
        pictures = [picture.image for picture in from_data_set(settings["dataset_id"], "")]
    prompts = settings["instance_prompts"]
    if len(prompts) != len(pictures):
        raise DiffgraftError(
            f"{path} has {len(prompts)} prompts for {len(pictures)} pictures: use the version that it is for."
        )
    order = np.arange(len(pictures))
    np.random.RandomState(0).shuffle(order)
    pairs = [(pictures[index].convert("RGB"), prompts[index]) for index in order]
    count = len(pairs) - settings["valid_size"] - settings["test_size"]
    return Task(settings, pairs[:count], pairs[count + settings["valid_size"] :])


def train(task: Task, base: Base, method: str, seed: int, folder: Path) -> dg.Run:
    """Train a method, given as NAME or NAME:KEY=VALUE,…, by the settings of the task."""
    name, _, more = method.partition(":")
    pictures, side = folder / "pictures", task.settings["resolution"]
    pictures.mkdir()
    for number, (picture, prompt) in enumerate(task.train):  # the shorter side to the resolution, the middle cut out
        ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR).save(pictures / f"{number:02}.png")
        (pictures / f"{number:02}.txt").write_text(prompt, "utf-8")
    wanted = task.settings["optimizer_kwargs"]
    common = {"rank": 32, "layers": "attention+feedforward", "text_encoder": False, "prior.weight": 0, "warmup": 0}
    common |= {"timesteps.distribution": "uniform", "lr_schedule": "constant", "crop": "center"}
    common |= {"previews": False, "sample_every": 0, "sample_prompts": "sks cat", "checkpoint_every": 0}
    settings = {**common, "method": name, **dict(item.split("=", 1) for item in more.split(",") if item)}
    return dg.train(
        "style", base=base, images=pictures, output=folder / "run", seed=seed, resolution=side, trigger="sks",
        steps=task.settings["max_steps"], batch=task.settings["batch_size"], lr=wanted["lr"],
        weight_decay=wanted["weight_decay"], **settings,
    )  # fmt: skip


def measure(task: Task, base: Base, encoder: Encoder, run: dg.Run) -> tuple[float, float]:
    """Return similarity to the test pictures, and drift."""
    prompts, others = [prompt for _, prompt in task.test] * REPEATS, task.settings["drift_image_prompts"]
    with Session(base) as session:
        bare = task.drawn(session, others, _DRIFT_SEED)
        session.use(run.adapter_file)
        drawn, moved = task.drawn(session, prompts, _TEST_SEED), task.drawn(session, others, _DRIFT_SEED)
    wanted = encoder.pictures([picture for picture, _ in task.test]).repeat(REPEATS, 1)
    similarity = (encoder.pictures(drawn) * wanted).sum(-1).mean()
    drift = 1 - (encoder.pictures(bare) * encoder.pictures(moved)).sum(-1).mean()
    return float(similarity), float(drift)


def row(task: Task, base: Base, encoder: Encoder, method: str, seeds: Sequence[int]) -> str:
    """Train a method with each seed, and return its row of the table."""
    figures, start = [], time.perf_counter()
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    size = 0
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            run = train(task, base, method, seed, Path(folder))
            size = run.adapter_file.stat().st_size
            figures.append(measure(task, base, encoder, run))
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if base.device.type == "cuda" else "–"
    spread = [_with_spread(own) for own in zip(*figures, strict=True)]
    seconds = (time.perf_counter() - start) / len(seeds)
    return f"| `{method}` | {' | '.join(spread)} | {size / 1e6:.1f} MB | {memory} | {seconds:.0f} s |"


def _with_spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peft_images", description=__doc__)
    parser.add_argument("peft", type=Path, help="clone of github.com/huggingface/peft")
    parser.add_argument("--method", action="append", help="NAME or NAME:KEY=VALUE,…; again for more [default: lora]")
    parser.add_argument("--base", default="", help="base instead of that of the settings")
    parser.add_argument("--seeds", type=int, default=1, help="number of trainings of each method")
    options = parser.parse_args(arguments)
    task = read_task(options.peft)
    base = dg.load_base(options.base or task.settings["model_id"], torch.bfloat16).to(device_of(""))
    encoder = load_encoder(task.settings["dino_model_id"])
    print("| method | similarity | drift | file | memory | time |\n|-|-|-|-|-|-|")
    for method in tqdm(options.method or ["lora"], "methods"):
        print(row(task, base, encoder, method, range(options.seeds)), flush=True)


if __name__ == "__main__":
    main()
