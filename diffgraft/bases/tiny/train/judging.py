"""Stage 2: the judge, trained on the world's pictures."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffgraft.bases.tiny.judge import LABELS, Judge, labels_of
from diffgraft.bases.tiny.train.fit import Plan, fit
from diffgraft.bases.tiny.train.pictures import UNSEEN, pictures, scene_at, to_tensor


def train_judge(work: Path, count: int, plan: Plan) -> Judge:
    torch.manual_seed(2)
    judge = Judge()
    world = pictures(work, "world", count)
    labels = torch.tensor([labels_of(scene_at(index)) for index in range(count)])

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([2, step])
        rows = rng.integers(0, count, plan.batch)
        x = to_tensor(world[np.sort(rows)])
        x = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        answers = judge(x)
        right = labels[np.sort(rows)]
        return sum((F.cross_entropy(answers[kind], right[:, i]) for i, kind in enumerate(LABELS)), torch.zeros(()))

    fit("judge", judge, loss, plan, work)
    return judge


@torch.no_grad()
def accuracy(judge: Judge, x: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of right answers for each kind of label; `x` [n, 3, 64, 64] in -1..1, `labels` [n, kinds]."""
    answers: dict[str, list[Tensor]] = {kind: [] for kind in LABELS}
    for start in range(0, len(x), 250):
        for kind, logits in judge(x[start : start + 250]).items():
            answers[kind].append(logits.argmax(1))
    return {kind: float((torch.cat(answers[kind]) == labels[:, i]).float().mean()) for i, kind in enumerate(LABELS)}


def unseen(work: Path, count: int = 4000) -> tuple[Tensor, Tensor]:
    """Pictures of scenes no stage was trained on, [n, 3, 64, 64] in -1..1, and their labels [n, kinds]."""
    x = to_tensor(pictures(work, "world", count, UNSEEN))
    return x, torch.tensor([labels_of(scene_at(UNSEEN + index)) for index in range(count)])
