"""The gradients of one optimiser step: a share of its examples after the other, on each process its own."""

from contextlib import nullcontext
from typing import Any

import torch

from diffgraft.rng import generator
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import Objective
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.runtime.processes import shared_mean


def accumulate(recipe: Recipe, accelerator: Any, predict: Predict, objective: Objective, step: int) -> dict[str, float]:
    """Add up the gradients of `step` (counted from 0), and return the means of the loss and its terms.

    How the examples of a step are dealt out to batches and processes changes no more than rounding.
    """
    share = recipe.batch * accelerator.num_processes
    device = accelerator.device
    terms: dict[str, float] = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # what is left to PyTorch's own generators, such as dropout, is a function of seed, step and process, too
        torch.manual_seed(generator(recipe.seed, step, accelerator.process_index, 4).initial_seed())
        for part in range(recipe.accumulate):
            place = (step * recipe.accumulate + part) * share + accelerator.process_index * recipe.batch
            last = part + 1 == recipe.accumulate
            with nullcontext() if last else accelerator.no_sync(predict):
                losses = objective.losses(predict, place, recipe.batch)
                accelerator.backward(losses["loss"] / recipe.accumulate)
            for name, value in losses.items():
                terms[name] = terms.get(name, 0.0) + float(value.detach()) / recipe.accumulate
    return shared_mean(accelerator, terms)


def shown_in(recipe: Recipe, accelerator: Any, objective: Objective, step: int) -> list[str]:
    """What the pictures of a step are called, each once."""
    count = recipe.batch * recipe.accumulate * accelerator.num_processes
    return list(dict.fromkeys(objective.names(step * count, count)))
