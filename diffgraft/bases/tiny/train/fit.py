"""Resumable training loop shared by all stages: linear warm-up and decay of the learning rate, and a weight EMA."""

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from diffgraft.bases.tiny.train.muon import MuonAndAdamW
from diffgraft.bases.tiny.train.work_folder import damaged, read_tensors, write_tensors
from diffgraft.devices import has_bfloat16
from diffgraft.errors import DiffgraftError


@dataclass(frozen=True)
class StagePlan:
    """Training schedule of one stage: steps, batch size, learning rate, EMA and optimizer."""

    steps: int
    """Number of optimizer steps."""
    batch: int
    """Number of pictures (or captions) in each step."""
    lr: float
    """Peak learning rate."""
    decay: float = 0.25
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    warmup: int = 200
    """Number of steps, at the start, over which the learning rate rises linearly."""
    average: float = 0.999
    """Decay of the EMA of the weights; the stage ends on the EMA weights."""
    muon: bool = False
    """Whether Muon trains the inner weight matrices; if false, AdamW trains all weights."""
    save_every: float = 120
    """Number of seconds between checkpoints."""

    def settings(self, inputs: str) -> dict[str, float | str]:
        """Return all that decides what is trained: the schedule, and what the loss is computed from."""
        return {**{name: value for name, value in asdict(self).items() if name != "save_every"}, "inputs": inputs}

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0."""
        decay_factor = (self.steps - step) / max(1.0, self.steps * self.decay)
        return self.lr * min(1.0, (step + 1) / self.warmup, max(decay_factor, 0.0))


def autocast() -> torch.autocast:
    """Return the context of mixed precision: bfloat16 where the processor has it, as others only emulate it slowly."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16())


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's weights, 10 hexadecimal digits, for naming cache files derived from the model."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:10]


def fit(
    name: str, model: nn.Module, loss: Callable[[int], Tensor], plan: StagePlan, work: Path, inputs: str = ""
) -> None:
    """Train `model` in place and leave it in evaluation mode, with its EMA weights.

    The stage saves checkpoints to ``work/<name>.pt`` and resumes from that file; a finished stage is only loaded. In
    the processes of a group of `torch.distributed`, each step uses the mean of their gradients.

    Args:
        name: Name of the stage, for the checkpoint file and the progress bar.
        model: Module to train.
        loss: Function from a step number to the loss of that step; it draws its batch from the step number alone.
        plan: Training schedule.
        work: Folder for the checkpoint.
        inputs: What the loss is computed from, such as the number of pictures and hashes of frozen models.

    Raises:
        DiffgraftError: The checkpoint is damaged, or of another schedule or other inputs.
    """
    path = work / f"{name}.pt"
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    optimizer: MuonAndAdamW | torch.optim.Optimizer
    if plan.muon:
        optimizer = MuonAndAdamW(model, plan.lr)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), plan.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first_step = 0
    if path.exists():
        state = read_checkpoint(path, plan, inputs)
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise damaged(path) from error
        average, first_step = state["average"], state["step"]

    shared = torch.distributed.is_initialized()
    is_main = not shared or torch.distributed.get_rank() == 0

    def save(step: int) -> None:
        if not is_main:
            return
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
        write_tensors(path, {**state, "settings": plan.settings(inputs)})

    model.train()
    last_save, smooth_loss = time.monotonic(), 0.0
    bar = tqdm(
        range(first_step, plan.steps), name, initial=first_step, total=plan.steps, mininterval=5, disable=not is_main
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        value = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        if shared:
            _average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema_decay = min(plan.average, (step + 1) / (step + 10))
        with torch.no_grad():
            pairs = [(average[key], current) for key, current in model.state_dict().items()]
            for mean, current in pairs:
                mean.lerp_(current, 1 - ema_decay) if mean.is_floating_point() else mean.copy_(current)
        smooth_loss += (value.item() - smooth_loss) * max(0.01, 1 / (step - first_step + 1))
        bar.set_postfix(loss=f"{smooth_loss:.4f}", refresh=False)
        if time.monotonic() - last_save > plan.save_every:
            save(step + 1)
            last_save = time.monotonic()
    if first_step < plan.steps:
        save(plan.steps)
    model.load_state_dict(average)
    model.eval()


def read_checkpoint(path: Path, plan: StagePlan, inputs: str) -> dict[str, Any]:
    """Read the checkpoint of a stage.

    Raises:
        DiffgraftError: It is damaged, or of another schedule or other inputs.
    """
    state = read_tensors(path, ("model", "optimizer", "average", "step", "settings"))
    wanted, stored = plan.settings(inputs), state["settings"]
    if changed := [name for name in wanted if stored.get(name) != wanted[name]]:
        listed = ", ".join(f"{name}: {stored.get(name)} → {wanted[name]}" for name in changed)
        raise DiffgraftError(
            f"{path} was trained with other settings than these ({listed}): give the former ones to go on, or another "
            "folder with --work."
        )
    return state


class Stage(Protocol):
    """A model and its loss, for training in one process or several."""

    @property
    def name(self) -> str:
        """Name of the stage, for the checkpoint file and the progress bar."""

    @property
    def inputs(self) -> str:
        """What the loss is computed from, such as the number of pictures and hashes of frozen models."""

    def new_model(self) -> nn.Module:
        """Create the untrained model, with the same weights each time."""

    def loss(self, model: nn.Module, count: int, seed: tuple[int, int]) -> Tensor:
        """Return the mean loss of `count` samples; `seed` (step, process) decides all that is random."""


def train_stage(stage: Stage, plan: StagePlan, work: Path, processes: int = 1) -> nn.Module:
    """Train the model of a stage, or resume from its checkpoint in `work`; it returns in evaluation mode.

    Args:
        stage: Model and loss.
        plan: Training schedule.
        work: Folder for the checkpoint.
        processes: Number of processes that share each batch, one thread each.
    """
    if (checkpoint := work / f"{stage.name}.pt").exists():
        read_checkpoint(checkpoint, plan, stage.inputs)  # before other processes would fail by it
    if processes > 1:
        with tempfile.TemporaryDirectory() as folder:
            address = f"file://{folder}/rendezvous"
            spawn(_train_share, (processes, address, stage, plan, work), processes)  # type: ignore[no-untyped-call]
    return _train(stage, plan, work)  # after other processes have trained it, this loads their checkpoint


def _train(stage: Stage, plan: StagePlan, work: Path, rank: int = 0, processes: int = 1) -> nn.Module:
    model = stage.new_model()
    fit(
        stage.name,
        model,
        lambda step: stage.loss(model, plan.batch // processes, (step, rank)),
        plan,
        work,
        stage.inputs,
    )
    return model


def _train_share(rank: int, processes: int, address: str, stage: Stage, plan: StagePlan, work: Path) -> None:
    """Train in one of several processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=processes)
    _train(stage, plan, work, rank, processes)
    torch.distributed.destroy_process_group()


def _average_gradients(model: nn.Module) -> None:
    """Replace gradients by their means over all processes."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
