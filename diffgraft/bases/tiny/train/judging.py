"""Stage 2 of the training: the judge, trained on pictures of the tiny world."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffgraft.bases.tiny.judge import LABELS, Judge, labels_of
from diffgraft.bases.tiny.train.fit import StagePlan, fit
from diffgraft.bases.tiny.train.pictures import UNSEEN, pictures, scene_at, to_tensor


def train_judge(work: Path, count: int, plan: StagePlan) -> Judge:
    """Train the judge on `count` pictures of the tiny world, or resume from the checkpoint in `work`."""
    torch.manual_seed(2)
    judge = Judge()
    world = pictures(work, "world", count)
    labels = torch.tensor([labels_of(scene_at(index)) for index in range(count)])

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([2, step])
        rows = rng.integers(0, count, plan.batch)
        x = to_tensor(world[np.sort(rows)])
        x = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        logits = judge(x)
        target = labels[np.sort(rows)]
        return sum((F.cross_entropy(logits[kind], target[:, i]) for i, kind in enumerate(LABELS)), torch.zeros(()))

    fit("judge", judge, loss, plan, work, f"{count} pictures")
    return judge


@torch.no_grad()
def accuracy(judge: Judge, x: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the accuracy for each label kind on pictures `x` [n, 3, 64, 64] in -1..1 with `labels` [n, kinds]."""
    predicted: dict[str, list[Tensor]] = {kind: [] for kind in LABELS}
    for start in range(0, len(x), 250):
        for kind, logits in judge(x[start : start + 250]).items():
            predicted[kind].append(logits.argmax(1))
    return {kind: float((torch.cat(predicted[kind]) == labels[:, i]).float().mean()) for i, kind in enumerate(LABELS)}


def unseen_pictures(work: Path, count: int = 4000) -> tuple[Tensor, Tensor]:
    """Return `count` pictures that no stage is trained on, [count, 3, 64, 64] in -1..1, and labels [count, kinds]."""
    x = to_tensor(pictures(work, "world", count, UNSEEN))
    return x, torch.tensor([labels_of(scene_at(UNSEEN + index)) for index in range(count)])
