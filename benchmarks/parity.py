"""Whether we train as the field does: ``python -m benchmarks.parity EXAMPLES`` runs diffusers' own scripts beside ours.

EXAMPLES is the folder of that name in a checkout of diffusers (``git clone --branch v0.40.0``: the release nearest to
the one installed here; the numbers that are kept come from it). The scripts also need torchvision, as it fits torch.

Both sides get the same base in float32, pictures, initial values, noises, timesteps and order: ours draws them, and the
script is handed what ours drew at the places where it would draw itself. Nothing else of a script is touched. What it
computes goes to ``tests/trainers/parity``, where a test holds our trainer to it.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from diffgraft.bases import Base, load_base
from diffgraft.data.image_folder import read_folder
from diffgraft.data.latents import Latents
from diffgraft.demo.subject import POODLE
from diffgraft.diffusion.forward import ForwardProcess, Noised
from diffgraft.files import write_text
from diffgraft.trainers.run import train_adapter
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.train import train
from diffgraft.trainers.training_data.examples import Examples

KEPT = Path(__file__).parents[1] / "tests" / "trainers" / "parity"
INSTANCE, CLASS = POODLE.folder / "learn", POODLE.folder / "held-out"
"""Five pictures to learn from, and eight that stand in for the class; of 64 × 64 pixels: resizing changes nothing."""

_SHARED = {"steps": 20, "batch": 4, "seed": 10, "checkpoint_every": 0, "sample_every": 0}
_SUBJECT = {**_SHARED, "subject": "dog", "rank": 2, "lr": 1e-3}
_WORD = {**_SHARED, "method": "textual-inversion", "subject": "dog", "trigger": "<zorp>", "lr": 5e-3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dreambooth-lora": ("subject", {**_SUBJECT, "prior": {"weight": 0}}),
    # so small a bound that the gradient is clipped
    "dreambooth-lora-prior": ("subject", {**_SUBJECT, "prior": {"weight": 1.0, "images": 8}, "max_grad_norm": 0.05}),
    # this script lets the vectors grow, and does not clip; the gradients here stay below our bound of 1
    "textual-inversion": ("concept", {**_WORD, "options": {"vectors": 2, "keep_norm": False}}),
}
"""Name → our recipe, and what is set in it. Under this seed no layer's gradient cancels so far that the rounding of
float32 alone, in which processors differ, comes near the bound of the test."""


@dataclass
class Record:
    """What one side did."""

    losses: list[float] = field(default_factory=list)
    values: list[dict[str, Tensor]] = field(default_factory=list)
    """The trained parameters before each of the first two steps"""
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Their gradients then, as the optimiser gets them: where one factor of LoRA is zero, so is the first gradient of
    the other"""

    def take(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> None:
        if len(self.values) < 2:
            self.values.append({name: value.detach().clone() for name, value in values.items()})
            self.gradients.append({name: grad.clone() for name, grad in gradients.items() if grad is not None})


def run_ours(recipe: str, base: Base, folder: Path, settings: Mapping[str, Any]) -> tuple[Run, Record]:
    """Train by the public way, and look at the optimiser as it steps."""
    record, real = Record(), train_adapter.new_optimizer

    def watched(plan: Any, parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float]) -> torch.optim.Optimizer:
        def look(*_: Any) -> None:
            record.take(parameters, {name: value.grad for name, value in parameters.items()})

        optimizer = real(plan, parameters, rates)
        optimizer.register_step_pre_hook(look)
        return optimizer

    def given_class(_: Base, prompts: Sequence[str], *__: Any) -> list[tuple[str, Any]]:
        return [(prompts[0], picture) for picture in read_folder(CLASS)]

    with (
        patch("diffgraft.trainers.run.train.before_after", lambda *_: Image.new("RGB", (8, 8))),  # nobody looks at it
        patch("diffgraft.trainers.run.train_adapter.new_optimizer", watched),
        patch("diffgraft.trainers.training_data.build.class_images", given_class),
    ):
        run = train(recipe, base=base, images=INSTANCE, output=folder, **settings)
    record.losses = [entry["loss"] for entry in run.metrics]
    return run, record


@dataclass
class Draws:
    """What our trainer drew, one entry a batch; instance and class batches take turns where there are both."""

    rows: list[list[int]] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    """What was said of each example, one after the other"""
    spread: list[Tensor] = field(default_factory=list)
    """Noise of the VAE's posterior, [n, c, h, w]"""
    noise: list[Tensor] = field(default_factory=list)
    """[n, c, h, w]"""
    times: list[Tensor] = field(default_factory=list)
    """[n]"""

    @contextmanager
    def watch(self) -> Iterator[None]:
        sample, add, said = Latents.sample, ForwardProcess.at_timesteps, Examples.prompt

        def watched_sample(latents: Latents, rows: Sequence[int], noise: Tensor) -> Tensor:
            self.rows.append(list(rows))
            self.spread.append(noise)
            return sample(latents, rows, noise)

        def watched_add(process: ForwardProcess, latents: Tensor, noise: Tensor, times: Tensor) -> Noised:
            self.noise.append(noise)
            self.times.append(times)
            return add(process, latents, noise, times)

        def watched_prompt(examples: Examples, *which: Any) -> str:
            self.prompts.append(said(examples, *which))
            return self.prompts[-1]

        with (
            patch.object(Latents, "sample", watched_sample),
            patch.object(ForwardProcess, "at_timesteps", watched_add),
            patch.object(Examples, "prompt", watched_prompt),
        ):
            yield


@dataclass
class Side:
    """How one script is run: what depends on which it is."""

    words: dict[str, Any]
    """Its arguments"""
    order: list[int]
    """What its data set is asked for, over all steps"""
    patches: list[Any]
    """Beside those that all scripts get"""
    trained: Callable[[torch.optim.Optimizer], tuple[dict[str, Tensor], dict[str, Tensor | None]]]
    """Values and gradients under our names, when its optimiser steps"""


def _dreambooth(script: Any, plan: Any, ours: Record, draws: Draws) -> Side:
    words = {
        "instance_data_dir": INSTANCE,
        "instance_prompt": plan.fill(plan.prompt),
        "center_crop": True,
        "rank": plan.rank,
        "max_grad_norm": plan.max_grad_norm,
    }
    order = list(chain(*draws.rows))
    if plan.prior.weight:
        words |= {
            "with_prior_preservation": True,
            "prior_loss_weight": plan.prior.weight,
            "class_data_dir": CLASS,
            "class_prompt": plan.fill(plan.class_prompt),
            "num_class_images": len(read_folder(CLASS)),
        }
        # an index stands for one picture of each kind, counted round and round; with 5 and 8 of them, for any two
        ways = {(index % 5, index % 8): index for index in range(5 * 8)}
        order = [ways[two] for two in zip(chain(*draws.rows[::2]), chain(*draws.rows[1::2]), strict=True)]
    live: dict[str, Tensor] = {}
    add_adapter, dataset = script.UNet2DConditionModel.add_adapter, script.DreamBoothDataset

    @torch.no_grad()
    def add_ours(unet: Any, config: Any) -> None:
        add_adapter(unet, config)
        leaves = {"lora_A.default.weight": "lora_down", "lora_B.default.weight": "lora_up"}
        for name, value in unet.named_parameters():
            for theirs, mine in leaves.items():
                if name.endswith(theirs):
                    live[f"unet.{name.removesuffix(theirs)}{mine}"] = value
        if live.keys() != ours.values[0].keys():
            raise ValueError(f"Only one of us trains {sorted(live.keys() ^ ours.values[0].keys())}.")
        for name, value in live.items():
            value.copy_(ours.values[0][name])

    def in_order(**given: Any) -> Any:
        made = dataset(**given)
        made.instance_images_path.sort()
        if plan.prior.weight:
            made.class_images_path.sort()
        return made

    patches = [
        patch.object(script.UNet2DConditionModel, "add_adapter", add_ours),
        patch.object(script, "DreamBoothDataset", in_order),
    ]
    return Side(words, order, patches, lambda _: (live, {name: value.grad for name, value in live.items()}))


def _textual_inversion(script: Any, plan: Any, ours: Record, draws: Draws) -> Side:
    vectors = plan.options["vectors"]
    words = {
        "train_data_dir": INSTANCE,
        "placeholder_token": plan.trigger,
        "initializer_token": plan.subject,
        "num_vectors": vectors,
    }
    texts = iter([prompt.replace(plan.trigger, "{}") for prompt in draws.prompts])
    dataset = script.TextualInversionDataset

    def in_order(**given: Any) -> Any:
        made = dataset(**given, flip_p=0)
        made.image_paths.sort()
        return made

    def trained(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Of the whole table, which it trains and puts back, the new rows."""
        (name,), (table,) = ours.values[0], optimizer.param_groups[0]["params"]
        return {name: table[-vectors:]}, {name: table.grad[-vectors:]}

    patches = [
        patch.object(script, "TextualInversionDataset", in_order),
        patch.object(script, "random", SimpleNamespace(choice=lambda _: next(texts))),
    ]
    return Side(words, list(chain(*draws.rows)), patches, trained)


SCRIPTS = {
    "subject": ("dreambooth/train_dreambooth_lora.py", _dreambooth),
    "concept": ("textual_inversion/textual_inversion.py", _textual_inversion),
}
"""Recipe → the script that does the same, and how it is run."""


def run_script(examples: Path, model: Path, output: Path, plan: Any, ours: Record, draws: Draws) -> Record:
    """Run the script for our recipe `plan` on the base in `model`, with what ours began with and drew."""
    from accelerate import Accelerator

    name, prepare = SCRIPTS[plan.task]
    spec = importlib.util.spec_from_file_location(Path(name).stem, examples / name)
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    side, record = prepare(script, plan, ours, draws), Record()
    words = side.words | {
        "pretrained_model_name_or_path": model,
        "output_dir": output,
        "resolution": 64,
        "train_batch_size": plan.batch,
        "max_train_steps": plan.steps,
        "learning_rate": plan.lr,
        "adam_weight_decay": plan.weight_decay,
    }
    flags = [part for key, value in words.items() for part in ([f"--{key}"] + [str(value)] * (value is not True))]
    backward = Accelerator.backward

    def watched_backward(accelerator: Any, loss: Tensor, **more: Any) -> None:
        record.losses.append(float(loss.detach()))
        backward(accelerator, loss, **more)

    def step_by_step(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Instance and class batches of a step as one."""
        each = len(batches) // plan.steps
        return iter([torch.cat(list(batches[at : at + each])) for at in range(0, len(batches), each)])

    spread, noise, times = map(step_by_step, (draws.spread, draws.noise, draws.times))
    with ExitStack() as stack:
        for each in (
            *side.patches,
            patch.object(sys, "argv", [name, *flags]),
            patch.object(Accelerator, "backward", watched_backward),
            patch("torch.utils.data.dataloader.RandomSampler", lambda *_, **__: side.order),
            patch("diffusers.models.autoencoders.vae.randn_tensor", lambda *_, **__: next(spread)),
            patch("torch.randn_like", lambda _: next(noise)),
            patch("torch.randint", lambda *_, **__: next(times)),
        ):
            stack.enter_context(each)
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_: record.take(*side.trained(optimizer)))
        stack.callback(hook.remove)
        script.args = script.parse_args()  # DreamBooth's data set reads this global
        script.main(*[script.args][: script.main.__code__.co_argcount])
    if any(next(left, None) is not None for left in (spread, noise, times)):
        raise ValueError(f"{name} has not taken all that we drew: it must have changed.")
    return record


WHOLE, PRODUCTS = 128, 32


def sketch(gradient: Tensor) -> list[float]:
    """A small tensor itself; of another, numbers whose distance is near that of the tensors; of zeros, none.

    They are its products with fixed normal tensors (Johnson and Lindenstrauss 1984), brought to its own length.
    """
    flat = gradient.detach().double().flatten().numpy()
    if not flat.any():
        return []
    if flat.size <= WHOLE:
        return [float(value) for value in flat]
    directions = np.random.default_rng(0).standard_normal((PRODUCTS, flat.size))
    return [float(value) for value in directions @ flat / math.sqrt(PRODUCTS)]


def summary(record: Record) -> dict[str, Any]:
    """Losses, and the norm and sketch of each parameter's gradient in the first two steps."""
    gradients = [
        {name: {"norm": float(grad.double().norm()), "sketch": sketch(grad)} for name, grad in step.items()}
        for step in record.gradients
    ]
    return {"losses": record.losses, "gradients": gradients}


def deviations(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, float]:
    """The largest relative deviation of one summary from another, in the losses and in the gradients of each step."""
    pairs = zip(found["losses"], wanted["losses"], strict=True)
    largest = {"losses": max(abs(a - b) / abs(b) for a, b in pairs)}
    for number, (ours, theirs) in enumerate(zip(found["gradients"], wanted["gradients"], strict=True), 1):
        if ours.keys() != theirs.keys():
            raise ValueError(f"Only one of them has {sorted(ours.keys() ^ theirs.keys())}.")
        gaps = [_gap(ours[name], theirs[name]) for name in theirs]
        largest[f"gradients of step {number}"] = max(gaps)
    return largest


def _gap(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    if not ours["norm"] or not theirs["norm"]:
        return 0.0 if ours["norm"] == theirs["norm"] else math.inf
    gap = max(math.dist(ours["sketch"], theirs["sketch"]), abs(ours["norm"] - theirs["norm"]))
    return float(gap / theirs["norm"])


def compare(examples: Path, case: str, base: Base, work: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Run both: what is to be kept of the script, and how far we are from it."""
    recipe, settings = CASES[case]
    draws, model = Draws(), work / "model"
    base.pipeline().save_pretrained(model)  # in float32: transformers would give a script the precision of the file
    with draws.watch():
        run, ours = run_ours(recipe, base, work / "ours", settings)
    theirs = run_script(examples, model, work / "theirs", run.recipe, ours, draws)
    script, _ = SCRIPTS[run.recipe.task]
    code = (examples / script).read_bytes()
    release = re.search(rb'^check_min_version\("(.+)"\)', code, re.MULTILINE)
    kept = {
        "script": f"examples/{script}",
        "diffusers": release[1].decode() if release else None,
        "git blob": hashlib.sha1(b"blob %d\0" % len(code) + code).hexdigest(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate")},
        "recipe": recipe,
        "settings": settings,
        **summary(theirs),
    }
    return kept, deviations(summary(ours), kept)


def dumps(kept: dict[str, Any]) -> str:
    """JSON with a line for each entry and gradient, and eight digits a number: a little more than float32 holds."""
    short = json.loads(json.dumps(kept), parse_float=lambda text: float(f"{float(text):.8g}"))
    gradients = [
        "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in step.items()) + "\n }"
        for step in short.pop("gradients")
    ]
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in short.items()]
    return "{\n" + ",\n".join([*lines, ' "gradients": [' + ", ".join(gradients) + "]"]) + "\n}"


def main() -> None:
    """Print how far we are from the scripts, and keep their numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("examples", type=Path, metavar="EXAMPLES", help="the folder examples of diffusers' repository")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, default=KEPT, help="where the scripts' numbers are kept")
    options = parser.parse_args()
    base, rows = load_base("tiny"), []
    for case in options.only:
        with tempfile.TemporaryDirectory() as work:
            kept, found = compare(options.examples, case, base, Path(work))
        write_text(options.out / f"{case}.json", dumps(kept) + "\n")
        rows.append(f"| {case} | " + " | ".join(f"{value:.1e}" for value in found.values()) + " |")
    print("| largest relative deviation | losses | gradients of step 1 | gradients of step 2 |\n|-|-|-|-|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
