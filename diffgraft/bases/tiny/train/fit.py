"""One loop for every stage: a linear ramp up and down, an average of the weights, resumable."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffgraft.bases.tiny.train.muon import MuonAndAdamW


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage trains."""

    steps: int
    """Number of optimiser steps."""
    batch: int
    """Pictures (or captions) in a step."""
    lr: float
    """Peak learning rate."""
    decay: float = 0.25
    """Share of the steps, at the end, over which the rate falls to zero."""
    warmup: int = 200
    """Steps over which the rate rises."""
    average: float = 0.999
    """Decay of the running average of the weights; the average is what is kept."""
    muon: bool = False
    """Muon for the weights inside the network; AdamW for all where false."""
    save_every: float = 120
    """Seconds between checkpoints."""

    def rate(self, step: int) -> float:
        """The learning rate of `step`."""
        left = (self.steps - step) / max(1.0, self.steps * self.decay)
        return self.lr * min(1.0, (step + 1) / self.warmup, max(left, 0.0))


def fingerprint(model: nn.Module) -> str:
    """Ten letters that stand for a model's weights: what is cached from it bears them in its name."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:10]


def fit(name: str, model: nn.Module, loss: Callable[[int], Tensor], plan: Plan, work: Path) -> None:
    """Train `model` in place; `loss(step)` draws its own batch from the step's number. Ends on the averaged weights.

    A checkpoint stands in ``work/<name>.pt``; started again, the stage goes on from there, and a stage that
    is done is loaded and left.
    """
    path = work / f"{name}.pt"
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    optimizer: MuonAndAdamW | torch.optim.Optimizer
    if plan.muon:
        optimizer = MuonAndAdamW(model, plan.lr)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), plan.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    model.train()
    saved, smooth = time.monotonic(), 0.0
    bar = tqdm(range(first, plan.steps), name, initial=first, total=plan.steps, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        value = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        keep = min(plan.average, (step + 1) / (step + 10))
        with torch.no_grad():
            floats = [(average[key], new) for key, new in model.state_dict().items()]
            for old, new in floats:
                old.lerp_(new, 1 - keep) if old.is_floating_point() else old.copy_(new)
        smooth += (value.item() - smooth) * max(0.01, 1 / (step - first + 1))
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if time.monotonic() - saved > plan.save_every:
            save(step + 1)
            saved = time.monotonic()
    if first < plan.steps:
        save(plan.steps)
    model.load_state_dict(average)
    model.eval()
