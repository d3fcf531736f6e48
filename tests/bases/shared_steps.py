"""A small stage of the training of `tiny` that processes share; for spawned processes, which import it alone."""

import torch
from torch import Tensor, nn

from diffgraft.bases.tiny.train.fit import StagePlan

PLAN = StagePlan(steps=12, batch=6, lr=1e-2, decay=0.5, warmup=3, average=0.8, save_every=0)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 4, (1, 3)))


class SmallStage:
    """Its processes share the pictures of a step among them."""

    name = "stage"
    inputs = "random"

    def new_model(self) -> nn.Module:
        return small_model()

    def loss(self, model: nn.Module, count: int, seed: tuple[int, int]) -> Tensor:
        step, process = seed
        x = torch.randn(PLAN.batch, 3, 7, 9, generator=torch.Generator().manual_seed(step))
        x = x[process :: PLAN.batch // count]
        total: Tensor = (model(x) - x.mean((1, 2, 3), keepdim=True)).square().mean()
        return total
