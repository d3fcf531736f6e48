"""The one training loop: every objective and every method goes through it."""

import errno
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffgraft.adapters.method import Attached
from diffgraft.errors import DiffgraftError
from diffgraft.files import to_disk, write_text
from diffgraft.generation.plots import save_loss_plot
from diffgraft.room import room_for
from diffgraft.trainers.average import Average
from diffgraft.trainers.captioned import Predict
from diffgraft.trainers.checkpoint import adopt, restore, save_checkpoint
from diffgraft.trainers.denoising import Denoiser
from diffgraft.trainers.examples import generator
from diffgraft.trainers.health import Health, broken
from diffgraft.trainers.identity import Identity
from diffgraft.trainers.interrupts import undisturbed
from diffgraft.trainers.optimizers import at_rest, new_optimizer, rate, settle
from diffgraft.trainers.pace import Pace, PacedBar
from diffgraft.trainers.rates import factors, stop_text
from diffgraft.trainers.recipe import Recipe
from diffgraft.trainers.sparing import Sparing
from diffgraft.trainers.trackers import end_trackers, start_trackers, track, track_picture
from diffgraft.trainers.validation import Trial


class Objective(Protocol):
    """What the loss is."""

    def losses(self, predict: Predict, place: int, count: int) -> dict[str, Tensor]:
        """Loss of `count` examples from `place` on, under "loss", and its terms."""

    def shown(self, place: int, count: int) -> list[str]:
        """What the pictures of these examples are called."""


@dataclass(frozen=True)
class OnTheWay:
    """Files that are made every so many steps, while the parameters have the values that count: samples, adapters."""

    every: int
    """0: never"""
    folder: Path
    suffix: str
    make: Callable[[int, Path], None]
    """Step and file → the file"""

    def file(self, step: int) -> Path:
        """That of a step."""
        return self.folder / f"step-{step:06d}{self.suffix}"


_PATIENCE = 20
"""Updates in a row that half precision may leave out: each halves the scale of the loss, from 65,536 to 1/16"""
_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def new_accelerator(recipe: Recipe) -> Any:
    """Accelerate's view of devices, processes and precision; ``accelerate launch`` is how more than one takes part."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

    wanted = _PRECISIONS[recipe.precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()  # it remembers the precision of an earlier run in this process
    some_stop = DistributedDataParallelKwargs(find_unused_parameters=recipe.text_encoder_stop is not None)
    places = ProjectConfiguration(recipe.output or None, str(Path(recipe.output, "logs")))
    accelerator = Accelerator(
        mixed_precision=wanted, kwargs_handlers=[some_stop], log_with=recipe.trackers or None, project_config=places
    )
    if wanted == "fp16" and accelerator.device.type == "cpu":
        raise DiffgraftError("precision=float16 needs a GPU; on a processor use precision=bfloat16 or float32.")
    return accelerator


def fit(
    recipe: Recipe,
    folder: Path,
    identity: Identity,
    accelerator: Any,
    denoiser: Denoiser,
    adapter: Attached,
    objective: Objective,
    on_the_way: Sequence[OnTheWay],
    trial: Trial | None = None,
    *,
    changed: bool = False,
) -> list[dict[str, float]]:
    """Train `adapter` for the recipe's steps, going on from the newest checkpoint in `folder` if there is one.

    A checkpoint of another `identity` is refused, unless that was `changed` on purpose.

    Returns:
        What was recorded of each step: its rate, loss and the objective's terms, and in entries of their own what was
        found out after it. It also stands in ``metrics.jsonl``.

    Raises:
        DiffgraftError: the loss or a gradient is no number any more (the state before that is kept), or the checkpoints
            belong to something else.
        KeyboardInterrupt: passed on, after a checkpoint was written (unless it came in the middle of an update).
    """
    paths = adapter.paths()
    parameters = {name: value for name, value in adapter.trainable().items() if value.requires_grad}
    optimizer = new_optimizer(recipe, parameters, factors(recipe, adapter))
    average = Average(parameters, recipe.ema) if recipe.ema else None
    done = restore(folder, identity, parameters, optimizer, average, accelerator.scaler, changed=changed)
    record = [entry for entry in read_record(folder) if entry["step"] <= done]
    if trial is not None:
        trial.go_on(record)
    health = Health(parameters, paths)
    predict, optimizer = accelerator.prepare(denoiser, optimizer)
    lead = accelerator.is_main_process
    if lead:
        adopt(folder, identity)
        write_text(folder / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in record))
        start_trackers(accelerator, recipe, done)
    steps = range(done, recipe.steps)
    bar = PacedBar(steps, "training", initial=done, total=recipe.steps, leave=False, disable=not lead)
    bar.pace = pace = Pace(recipe.steps)
    saved, stepping, lost = done, False, 0
    text_stops = None if recipe.text_encoder_stop is None else max(recipe.text_encoder_stop, done)

    def ends() -> bool:
        return done == recipe.steps or (trial is not None and trial.is_over())

    def save() -> None:
        nonlocal saved
        with undisturbed(), pace.pause("checkpoint", recipe.checkpoint_every or recipe.steps):
            to_disk(folder / "metrics.jsonl")  # a checkpoint must not outlive what it has recorded
            is_due = ends() or _due(recipe.checkpoint_every, done)
            scaler = accelerator.scaler
            save_checkpoint(folder, done, identity, parameters, optimizer, average, scaler, is_due=is_due)
            saved = done

    plot = Sparing(lambda: save_loss_plot(curves(record), folder / "loss.png"))

    def note(entry: dict[str, float]) -> None:
        record.append(entry)
        if lead:
            _append(folder, entry)
            track(accelerator, entry)

    def make(due: OnTheWay) -> None:
        with pace.pause(due.folder.name, due.every), at_rest(optimizer, average):
            due.make(done, due.file(done))
        if due.suffix == ".png":
            track_picture(accelerator, due.folder.name, due.file(done), done)

    def validate(trial: Trial) -> None:
        with pace.pause("validation", trial.settings.every), at_rest(optimizer, average):
            loss = _validated(trial, done, predict, accelerator)
        with undisturbed():
            note({"step": done, "validation": loss})

    try:
        if trial is not None and done and trial.is_due(done, recipe.steps) and "validation" not in record[-1]:
            validate(trial)  # it was stopped between that checkpoint and its validation
        for one in on_the_way:
            if lead and _due(one.every, done) and not one.file(done).exists():
                make(one)  # it was stopped between that checkpoint and this
        for step in bar:
            if trial is not None and trial.is_over():
                break
            if step == text_stops:
                with undisturbed():
                    stop_text(adapter, optimizer, average)
                    denoiser.freeze_text()
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * rate(recipe, step)
            with _random_numbers_of(recipe.seed, step, accelerator):
                terms = _accumulate(recipe, accelerator, predict, objective, step)
            norm = accelerator.clip_grad_norm_(list(parameters.values()), recipe.max_grad_norm)
            lost = 0 if torch.as_tensor(norm).isfinite() else lost + 1
            # in half precision such updates are left out, and smaller numbers tried
            if not math.isfinite(terms["loss"]) or lost == (1 if accelerator.scaler is None else _PATIENCE):
                optimizer.zero_grad()
                with _random_numbers_of(recipe.seed, step, accelerator):  # the same again: clipping has spread it
                    _accumulate(recipe, accelerator, predict, objective, step)
                if lead and done > saved:
                    save()
                where = broken(parameters, paths)
                raise DiffgraftError(_diverged(recipe, terms["loss"], step, lost, where, objective, accelerator))
            health.note()
            with undisturbed():
                stepping = True
                optimizer.step()
                adapter.after_step()
                if average is not None:
                    average.step()
                optimizer.zero_grad()
                note({"step": step + 1, "lr": rate(recipe, step), **terms})
                done, stepping = step + 1, False
            pace.stepped()
            if trial is not None and trial.is_due(done, recipe.steps):
                validate(trial)
            bar.set_postfix(loss=f"{terms['loss']:.4f}", refresh=False)
            if lead:
                if ends() or _due(recipe.checkpoint_every, done):
                    save()
                for one in on_the_way:
                    if _due(one.every, done):
                        make(one)
                plot()
    except KeyboardInterrupt:
        if lead and done > saved and not stepping:  # within a step, some weights have moved and others have not
            save()
        raise
    finally:
        end_trackers(accelerator)
    settle(optimizer, average)
    accelerator.free_memory()
    if lead and (still := health.still()):
        warnings.warn(
            f"{len(still)} of the modules never moved, such as {still[0]}: what they compute never reached the loss.",
            stacklevel=3,
        )
    return record


def _validated(trial: Trial, step: int, predict: Predict, accelerator: Any) -> float:
    """The held-out loss now, the same number on all processes; a new best is kept."""
    own = torch.tensor(trial.loss(predict, accelerator.device), device=accelerator.device, dtype=torch.float32)
    loss = float(accelerator.reduce(own, "mean"))
    if trial.best.take(step, loss):
        trial.keep()
    return loss


def _diverged(
    recipe: Recipe, loss: float, step: int, lost: int, module: str, objective: Objective, accelerator: Any
) -> str:
    """What a person is told when numbers are none any more; `lost` updates in a row could not be made."""
    count = recipe.batch * recipe.accumulate * accelerator.num_processes
    names = list(dict.fromkeys(objective.shown(step * count, count)))
    where = f"the first gradient that is no number is that of {module}" if module else "all gradients are numbers"
    tried = f", where {lost} updates in a row could not be made" if lost > 1 else ""
    return (
        f"Training has diverged at step {step + 1}{tried}: the loss is {loss:.4g}, and {where}. Its pictures were: "
        f"{', '.join(names[:8])}{' …' if len(names) > 8 else ''}. The newest checkpoint is of the step before. Lower "
        f"lr (now {recipe.lr}), or use precision=bfloat16 or float32 if it was float16."
    )


def _due(every: int, done: int) -> bool:
    """Whether what comes every so many steps, where 0 is never, comes after this one."""
    return every > 0 and done > 0 and done % every == 0


@contextmanager
def _random_numbers_of(seed: int, step: int, accelerator: Any) -> Iterator[None]:
    """What is left to PyTorch's own generators, such as dropout, is a function of seed, step and process, too."""
    device = accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(generator(seed, step, accelerator.process_index, 4).initial_seed())
        yield


def _accumulate(
    recipe: Recipe, accelerator: Any, predict: Predict, objective: Objective, step: int
) -> dict[str, float]:
    """Add up the gradients of one optimiser step, and return the means of the loss and its terms."""
    share = recipe.batch * accelerator.num_processes
    terms: dict[str, float] = {}
    for part in range(recipe.accumulate):
        place = (step * recipe.accumulate + part) * share + accelerator.process_index * recipe.batch
        last = part + 1 == recipe.accumulate
        with nullcontext() if last else accelerator.no_sync(predict):
            losses = objective.losses(predict, place, recipe.batch)
            accelerator.backward(losses["loss"] / recipe.accumulate)
        for name, value in losses.items():
            terms[name] = terms.get(name, 0.0) + float(value.detach()) / recipe.accumulate
    return terms


def by_step(record: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """One entry a step: what was found out after it stands in lines of its own."""
    steps: dict[float, dict[str, float]] = {}
    for entry in record:
        steps.setdefault(entry["step"], {}).update(entry)
    return list(steps.values())


def read_record(folder: Path) -> list[dict[str, float]]:
    """The whole lines of a run's ``metrics.jsonl``; none where there is no such file yet."""
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def curves(metrics: Sequence[dict[str, float]]) -> dict[str, dict[int, float]]:
    """Every loss in the entries of a run, with the steps it is of."""
    names = dict.fromkeys(name for entry in metrics for name in entry if name not in ("step", "lr"))
    return {name: {int(entry["step"]): entry[name] for entry in metrics if name in entry} for name in names}


def _append(folder: Path, entry: dict[str, float]) -> None:
    path, line = folder / "metrics.jsonl", (json.dumps(entry) + "\n").encode()
    with room_for(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        if file.write(line) < len(line):
            file.truncate(before)
            raise OSError(errno.ENOSPC, "half a line")
