"""A small stage of the training of `tiny` that processes share; for spawned processes, which import it alone."""

from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn

from diffgraft.bases.tiny.train.fit import StagePlan, fit

PLAN = StagePlan(steps=12, batch=6, lr=1e-2, decay=0.5, warmup=3, average=0.8, save_every=0)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 4, (1, 3)))


def train(work: Path, plan: StagePlan, rank: int = 0, processes: int = 1) -> nn.Module:
    """Train on every step's batch, or on this process' share of it."""
    model = small_model()

    def loss(step: int) -> Tensor:
        x = torch.randn(plan.batch, 3, 7, 9, generator=torch.Generator().manual_seed(step))[rank::processes]
        total: Tensor = (model(x) - x.mean((1, 2, 3), keepdim=True)).square().mean()
        return total

    fit("stage", model, loss, plan, work)
    return model


def train_share(rank: int, processes: int, address: str, work: Path, plan: StagePlan) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=processes)
    train(work, plan, rank, processes)
    torch.distributed.destroy_process_group()
