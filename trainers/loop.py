"""The one training loop: every objective and every method goes through it."""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffgraft.errors import DiffgraftError
from diffgraft.files import write_text
from diffgraft.trainers.captioned import Predict
from diffgraft.trainers.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from diffgraft.trainers.denoising import Denoiser
from diffgraft.trainers.recipe import Recipe


class Objective(Protocol):
    """What the loss is."""

    def losses(self, predict: Predict, place: int, count: int) -> dict[str, Tensor]:
        """Loss of `count` examples from `place` on, under "loss", and its terms."""


_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def new_accelerator(recipe: Recipe) -> Any:
    """Accelerate's view of devices, processes and precision; ``accelerate launch`` is how more than one takes part."""
    from accelerate import Accelerator

    return Accelerator(mixed_precision=_PRECISIONS[recipe.precision])


def rate(recipe: Recipe, step: int) -> float:
    """Learning rate of a step (counted from 0): a linear warm-up, then constant or half a cosine to zero."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.lr_schedule == "constant":
        return recipe.lr
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * share))


def new_optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser a recipe names."""
    kwargs: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw8bit":
        import bitsandbytes

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **kwargs)
        return optimizer
    return torch.optim.AdamW(parameters, **kwargs)


def fit(
    recipe: Recipe,
    folder: Path,
    accelerator: Any,
    denoiser: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    sample: Callable[[int], None],
) -> list[dict[str, float]]:
    """Train `parameters` for the recipe's steps, going on from the newest checkpoint in `folder` if there is one.

    Returns:
        What each step recorded: step, rate, loss and the objective's terms. It also stands in ``metrics.jsonl``.

    Raises:
        DiffgraftError: the loss is no number any more.
        KeyboardInterrupt: passed on, after a checkpoint was written.
    """
    optimizer = new_optimizer(recipe, list(parameters.values()))
    done = 0
    if found := checkpoints(folder):
        done = load_checkpoint(found[-1], parameters, optimizer)
    record = _read_record(folder, done)
    predict, optimizer = accelerator.prepare(denoiser, optimizer)
    share = recipe.batch * accelerator.num_processes
    lead = accelerator.is_main_process
    bar = tqdm(range(done, recipe.steps), "training", initial=done, total=recipe.steps, leave=False, disable=not lead)
    step = done
    try:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = rate(recipe, step)
            sums: dict[str, float] = {}
            for part in range(recipe.accumulate):
                place = (step * recipe.accumulate + part) * share + accelerator.process_index * recipe.batch
                last = part + 1 == recipe.accumulate
                with nullcontext() if last else accelerator.no_sync(predict):
                    losses = objective.losses(predict, place, recipe.batch)
                    accelerator.backward(losses["loss"] / recipe.accumulate)
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / recipe.accumulate
            if not math.isfinite(sums["loss"]):
                raise DiffgraftError(
                    f"The loss is {sums['loss']} at step {step + 1}: it has diverged. Lower lr (now {recipe.lr}), "
                    "or use precision=bfloat16 or float32 if it was float16."
                )
            accelerator.clip_grad_norm_(list(parameters.values()), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            record.append({"step": step + 1, "lr": rate(recipe, step), **sums})
            bar.set_postfix(loss=f"{sums['loss']:.4f}", refresh=False)
            if lead:
                _append(folder, record[-1])
                finished = step + 1 == recipe.steps
                if recipe.checkpoint_every and (step + 1) % recipe.checkpoint_every == 0 and not finished:
                    save_checkpoint(folder, step + 1, parameters, optimizer)
                if recipe.sample_every and (step + 1) % recipe.sample_every == 0:
                    sample(step + 1)
    except KeyboardInterrupt:
        if lead and len(record) > done:
            save_checkpoint(folder, int(record[-1]["step"]), parameters, optimizer)
        raise
    if lead and recipe.steps > done:
        save_checkpoint(folder, recipe.steps, parameters, optimizer)
    accelerator.free_memory()
    return record


def _read_record(folder: Path, done: int) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl`` up to the step that training goes on from; what came after it is cut off."""
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    record = [json.loads(line) for line in lines if line.endswith("}")]
    kept: list[dict[str, float]] = [entry for entry in record if entry["step"] <= done]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return kept


def _append(folder: Path, entry: dict[str, float]) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
