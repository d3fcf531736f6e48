"""Parity with the example scripts of diffusers: ``python -m benchmarks.parity EXAMPLES`` runs them beside our trainer.

EXAMPLES is the folder ``examples`` of a checkout of diffusers (``git clone --branch v0.40.0``, the release that the
stored numbers come from). The scripts also need a version of torchvision that fits torch.

Both sides get the same base in float32, pictures, initial values, noise, timesteps and order: our trainer draws them,
and the script gets them wherever it would draw random values itself. Nothing else in a script is patched. Its losses
and gradients are stored in ``tests/trainers/parity``, where a test compares our trainer with them.
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
"""Folders with five training pictures, and with eight that serve as class images; all are 64 × 64 pixels"""

_SHARED = {"steps": 20, "batch": 4, "seed": 10, "checkpoint_every": 0, "sample_every": 0}
_SUBJECT = {**_SHARED, "subject": "dog", "rank": 2, "lr": 1e-3}
_WORD = {**_SHARED, "method": "textual-inversion", "subject": "dog", "trigger": "<zorp>", "lr": 5e-3}
PLAIN: dict[str, Any] = {
    "layers": "attention",
    "crop": "center",
    "lr_schedule": "constant",
    "warmup": 0,
    "attention": "default",
    "timesteps": {"distribution": "uniform"},
    "prior": {"by": "pictures", "prompts": []},
}
"""What the scripts do, in the place of what the recipe `subject` is tuned to"""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dreambooth-lora": ("subject", {**_SUBJECT, "prior": {"weight": 0}}),
    # the bound is so small that the gradient is clipped
    "dreambooth-lora-prior": ("subject", {**_SUBJECT, "prior": {"weight": 1.0, "images": 8}, "max_grad_norm": 0.05}),
    # this script neither keeps the norm of vectors nor clips; the gradients here stay below our bound of 1
    "textual-inversion": ("concept", {**_WORD, "options": {"vectors": 2, "keep_norm": False}}),
}
"""Name → our recipe and its settings. With this seed, no layer's gradient cancels so far that float32 rounding, which
differs between processors, comes near the bound of the test."""


@dataclass
class Record:
    """Losses, parameters and gradients of one side."""

    losses: list[float] = field(default_factory=list)
    values: list[dict[str, Tensor]] = field(default_factory=list)
    """The trained parameters before each of the first two steps"""
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """The gradients of these steps, as the optimizer gets them. As one factor of LoRA starts at zero, the first
    gradient of the other is zero"""

    def take(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> None:
        if len(self.values) < 2:
            self.values.append({name: value.detach().clone() for name, value in values.items()})
            self.gradients.append({name: grad.clone() for name, grad in gradients.items() if grad is not None})


def run_ours(recipe: str, base: Base, folder: Path, settings: Mapping[str, Any]) -> tuple[Run, Record]:
    """Train with the public `train`, and record parameters and gradients before each optimizer step."""
    record, real = Record(), train_adapter.new_optimizer

    def watched(
        optim: Any, parameters: Mapping[str, nn.Parameter], scales: Mapping[str, float]
    ) -> torch.optim.Optimizer:
        def look(*_: Any) -> None:
            record.take(parameters, {name: value.grad for name, value in parameters.items()})

        optimizer = real(optim, parameters, scales)
        optimizer.register_step_pre_hook(look)
        return optimizer

    def given_class(_: Base, prompts: Sequence[str], *__: Any) -> list[tuple[str, Any]]:
        return [(prompts[0], picture) for picture in read_folder(CLASS)]

    with (
        patch("diffgraft.trainers.run.train.before_after", lambda *_: Image.new("RGB", (8, 8))),  # not needed here
        patch("diffgraft.trainers.run.train_adapter.new_optimizer", watched),
        patch("diffgraft.trainers.training_data.build.class_images", given_class),
    ):
        plain = {**PLAIN, "prior": {**PLAIN["prior"], **settings["prior"]}} if recipe == "subject" else {}
        run = train(recipe, base=base, images=INSTANCE, output=folder, **{**settings, **plain})
    record.losses = [entry["loss"] for entry in run.metrics]
    return run, record


@dataclass
class Draws:
    """Random values that our trainer drew, one entry per batch; if there are class batches, they alternate."""

    rows: list[list[int]] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    """Prompt of each example, in order"""
    spread: list[Tensor] = field(default_factory=list)
    """Noise of the VAE's posterior, [n, c, h, w]"""
    noise: list[Tensor] = field(default_factory=list)
    """[n, c, h, w]"""
    times: list[Tensor] = field(default_factory=list)
    """[n]"""

    @contextmanager
    def watch(self) -> Iterator[None]:
        sample, add, prompt = Latents.sample, ForwardProcess.at_timesteps, Examples.prompt

        def watched_sample(latents: Latents, rows: Sequence[int], noise: Tensor) -> Tensor:
            self.rows.append(list(rows))
            self.spread.append(noise)
            return sample(latents, rows, noise)

        def watched_add(process: ForwardProcess, latents: Tensor, noise: Tensor, times: Tensor) -> Noised:
            self.noise.append(noise)
            self.times.append(times)
            return add(process, latents, noise, times)

        def watched_prompt(examples: Examples, *which: Any) -> str:
            self.prompts.append(prompt(examples, *which))
            return self.prompts[-1]

        with (
            patch.object(Latents, "sample", watched_sample),
            patch.object(ForwardProcess, "at_timesteps", watched_add),
            patch.object(Examples, "prompt", watched_prompt),
        ):
            yield


@dataclass
class Side:
    """How to run one of the scripts."""

    arguments: dict[str, Any]
    """Command-line arguments of the script"""
    order: list[int]
    """Indices into the script's data set, over all steps"""
    patches: list[Any]
    """Patches for this script only"""
    trained: Callable[[torch.optim.Optimizer], tuple[dict[str, Tensor], dict[str, Tensor | None]]]
    """Parameters and gradients under our names, called before each step of the script's optimizer"""


def _dreambooth(script: Any, recipe: Any, ours: Record, draws: Draws) -> Side:
    arguments = {
        "instance_data_dir": INSTANCE,
        "instance_prompt": recipe.fill(recipe.prompt),
        "center_crop": True,
        "rank": recipe.rank,
        "max_grad_norm": recipe.max_grad_norm,
    }
    order = list(chain(*draws.rows))
    if recipe.prior.weight:
        arguments |= {
            "with_prior_preservation": True,
            "prior_loss_weight": recipe.prior.weight,
            "class_data_dir": CLASS,
            "class_prompt": recipe.fill(recipe.class_prompt),
            "num_class_images": len(read_folder(CLASS)),
        }
        # an index selects instance picture index % 5 and class picture index % 8: any pair has an index below 40
        indices = {(index % 5, index % 8): index for index in range(5 * 8)}
        order = [indices[pair] for pair in zip(chain(*draws.rows[::2]), chain(*draws.rows[1::2]), strict=True)]
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
            raise ValueError(f"Only one side trains {sorted(live.keys() ^ ours.values[0].keys())}.")
        for name, value in live.items():
            value.copy_(ours.values[0][name])

    def in_order(**options: Any) -> Any:
        made = dataset(**options)
        made.instance_images_path.sort()
        if recipe.prior.weight:
            made.class_images_path.sort()
        return made

    patches = [
        patch.object(script.UNet2DConditionModel, "add_adapter", add_ours),
        patch.object(script, "DreamBoothDataset", in_order),
    ]
    return Side(arguments, order, patches, lambda _: (live, {name: value.grad for name, value in live.items()}))


def _textual_inversion(script: Any, recipe: Any, ours: Record, draws: Draws) -> Side:
    vectors = recipe.options["vectors"]
    arguments = {
        "train_data_dir": INSTANCE,
        "placeholder_token": recipe.trigger,
        "initializer_token": recipe.subject,
        "num_vectors": vectors,
    }
    texts = iter([prompt.replace(recipe.trigger, "{}") for prompt in draws.prompts])
    dataset = script.TextualInversionDataset

    def in_order(**options: Any) -> Any:
        made = dataset(**options, flip_p=0)
        made.image_paths.sort()
        return made

    def trained(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Return the new rows of the embedding table; the script trains the whole table and restores the rest."""
        (name,), (table,) = ours.values[0], optimizer.param_groups[0]["params"]
        return {name: table[-vectors:]}, {name: table.grad[-vectors:]}

    patches = [
        patch.object(script, "TextualInversionDataset", in_order),
        patch.object(script, "random", SimpleNamespace(choice=lambda _: next(texts))),
    ]
    return Side(arguments, list(chain(*draws.rows)), patches, trained)


SCRIPTS = {
    "subject": ("dreambooth/train_dreambooth_lora.py", _dreambooth),
    "concept": ("textual_inversion/textual_inversion.py", _textual_inversion),
}
"""Recipe → corresponding script of diffusers, and function that prepares it"""


def run_script(examples: Path, model: Path, output: Path, recipe: Any, ours: Record, draws: Draws) -> Record:
    """Run the script for `recipe` on the base in `model`, with our initial values and random values."""
    from accelerate import Accelerator

    name, prepare = SCRIPTS[recipe.task]
    spec = importlib.util.spec_from_file_location(Path(name).stem, examples / name)
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    side, record = prepare(script, recipe, ours, draws), Record()
    arguments = side.arguments | {
        "pretrained_model_name_or_path": model,
        "output_dir": output,
        "resolution": 64,
        "train_batch_size": recipe.batch,
        "max_train_steps": recipe.steps,
        "learning_rate": recipe.lr,
        "adam_weight_decay": recipe.weight_decay,
    }
    flags = [part for key, value in arguments.items() for part in ([f"--{key}"] + [str(value)] * (value is not True))]
    backward = Accelerator.backward

    def watched_backward(accelerator: Any, loss: Tensor, **more: Any) -> None:
        record.losses.append(float(loss.detach()))
        backward(accelerator, loss, **more)

    def step_by_step(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the instance and class batches of each step as one tensor."""
        each = len(batches) // recipe.steps
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
    if any(next(rest, None) is not None for rest in (spread, noise, times)):
        raise ValueError(
            f"{name} did not use all random values of our trainer: this version of the script draws differently."
        )
    return record


WHOLE, PRODUCTS = 128, 32


def sketch(gradient: Tensor) -> list[float]:
    """Return a short list of numbers that preserves distances between gradients approximately.

    Small tensors are returned completely, and zeros as an empty list. For others the numbers are products with fixed
    normal tensors (Johnson and Lindenstrauss 1984), scaled to preserve the norm.
    """
    flat = gradient.detach().double().flatten().numpy()
    if not flat.any():
        return []
    if flat.size <= WHOLE:
        return [float(value) for value in flat]
    directions = np.random.default_rng(0).standard_normal((PRODUCTS, flat.size))
    return [float(value) for value in directions @ flat / math.sqrt(PRODUCTS)]


def summary(record: Record) -> dict[str, Any]:
    """Return the losses, and the norm and sketch of each parameter's gradient in the first two steps."""
    gradients = [
        {name: {"norm": float(grad.double().norm()), "sketch": sketch(grad)} for name, grad in step.items()}
        for step in record.gradients
    ]
    return {"losses": record.losses, "gradients": gradients}


def deviations(measured: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest relative deviation of a summary from a reference, in the losses and each step's gradients."""
    pairs = zip(measured["losses"], reference["losses"], strict=True)
    largest = {"losses": max(abs(a - b) / abs(b) for a, b in pairs)}
    for number, (ours, theirs) in enumerate(zip(measured["gradients"], reference["gradients"], strict=True), 1):
        if ours.keys() != theirs.keys():
            raise ValueError(f"Only one side has gradients of {sorted(ours.keys() ^ theirs.keys())}.")
        gaps = [_gap(ours[name], theirs[name]) for name in theirs]
        largest[f"gradients of step {number}"] = max(gaps)
    return largest


def _gap(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    if not ours["norm"] or not theirs["norm"]:
        return 0.0 if ours["norm"] == theirs["norm"] else math.inf
    gap = max(math.dist(ours["sketch"], theirs["sketch"]), abs(ours["norm"] - theirs["norm"]))
    return float(gap / theirs["norm"])


def compare(examples: Path, case: str, base: Base, work: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Run both sides, and return the summary of the script to store and our deviations from it."""
    recipe, settings = CASES[case]
    draws, model = Draws(), work / "model"
    base.pipeline().save_pretrained(
        model
    )  # in float32, because scripts load text encoders in the precision of the file
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
    """Return JSON with a line for each entry and gradient, and eight digits per number (float32 has seven)."""
    short = json.loads(json.dumps(kept), parse_float=lambda text: float(f"{float(text):.8g}"))
    gradients = [
        "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in step.items()) + "\n }"
        for step in short.pop("gradients")
    ]
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in short.items()]
    return "{\n" + ",\n".join([*lines, ' "gradients": [' + ", ".join(gradients) + "]"]) + "\n}"


def main() -> None:
    """Print our deviations from the scripts, and store the scripts' numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("examples", type=Path, metavar="EXAMPLES", help="folder `examples` of a checkout of diffusers")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, default=KEPT, help="folder to store the scripts' numbers in")
    options = parser.parse_args()
    base, rows = load_base("tiny"), []
    for case in options.only:
        with tempfile.TemporaryDirectory() as work:
            kept, deviation = compare(options.examples, case, base, Path(work))
        write_text(options.out / f"{case}.json", dumps(kept) + "\n")
        rows.append(f"| {case} | " + " | ".join(f"{value:.1e}" for value in deviation.values()) + " |")
    print("| largest relative deviation | losses | gradients of step 1 | gradients of step 2 |\n|-|-|-|-|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
