"""Checkpoints: adapter, optimiser state and step, in safetensors and JSON; written whole or not at all.

``state.json`` has the SHA-256 of the other files and of itself: a flipped bit would train on as another adapter.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffgraft.errors import DiffgraftError
from diffgraft.files import atomic_folder, remove_dir, write_safetensors, write_text
from diffgraft.progress import Artifact, emit
from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.hooks.metrics import Metrics
from diffgraft.trainers.run.fingerprint import Fingerprint, after, differences
from diffgraft.trainers.runtime.interrupts import defer_sigint
from diffgraft.trainers.state import TrainingState

_EIGHT_BIT = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes hides an 8-bit state from tools that would cast it; it loads from the plain names as well."""
_NAME = re.compile(r"step-\d{6,12}")
"""The folder of a checkpoint; what a person has copied beside it under another name is left alone"""
_FILE = re.compile(r"\w+\.safetensors")
_STATE = {"step": int, "is_due": bool, "identity": dict, "optimizer": dict, "groups": list}
"""What a checkpoint's state has at least, and of which type"""
_PLAIN = (bool, int, float)
"""What is kept of an optimiser's groups: some count their steps there, or find their rate"""
_OF_RECIPE = ("lr", "rate", "weight_decay")
"""What is not, as the recipe says it"""


class CheckpointHook(Hook):
    """Writes checkpoints: every so many steps, on request, at the end, and where a run is interrupted."""

    name = "checkpoint"

    def __init__(self, folder: Path, fingerprint: Fingerprint, every: int, metrics: Metrics) -> None:
        """`fingerprint` is that of the run in `folder`; with `every` 0 one is written at the end alone."""
        self._folder, self._fingerprint, self._metrics = folder, fingerprint, metrics
        self._every = every
        self._saved = 0

    def begin(self, state: TrainingState) -> None:
        self.every = self._every or state.steps
        self._saved = state.step
        if state.is_main:
            accept_changes(self._folder, self._fingerprint)

    def is_due(self, state: TrainingState, asked: Collection[str]) -> bool:
        return state.is_over or state.is_due(self._every) or "save" in asked

    def run(self, state: TrainingState) -> None:
        if state.is_main:
            self._save(state)

    def interrupted(self, state: TrainingState) -> None:
        """Save what is new since the newest checkpoint."""
        if state.is_main and state.step > self._saved:
            self._save(state)

    def _save(self, state: TrainingState) -> None:
        with defer_sigint():
            self._metrics.fsync()
            is_due = state.is_over or state.is_due(self._every)
            folder = save_checkpoint(self._folder, self._fingerprint, state, is_due=is_due)
            self._saved = state.step
        emit(Artifact("checkpoint", folder, state.step))


def save_checkpoint(
    run: Path, fingerprint: Fingerprint, state: TrainingState, *, is_due: bool = True, keep: int = 2
) -> Path:
    """Write ``checkpoints/step-NNNNNN`` of the run's folder; older ones than the last `keep` are deleted.

    So are older ones that were not due, but came of an interruption: a run that was interrupted leaves the same
    checkpoints as one that was not.
    """
    parameters, optimizer = state.parameters, state.optimizer
    tensors = {name: value.detach().cpu() for name, value in parameters.items()}
    moments: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    names = _names(parameters, optimizer)
    for index, held in optimizer.state_dict()["state"].items():
        for key, value in {**held, **held.get(_EIGHT_BIT, {})}.items():
            if isinstance(value, Tensor):
                moments[f"{key} {names[index]}"] = value.detach().cpu().contiguous().clone()
            elif key != _EIGHT_BIT:
                numbers.setdefault(names[index], {})[key] = value
    groups = [
        {key: value for key, value in group.items() if type(value) in _PLAIN and key not in _OF_RECIPE}
        for group in optimizer.param_groups
    ]
    said = {"step": state.step, "is_due": is_due, "identity": fingerprint, "optimizer": numbers, "groups": groups}
    said["scaler"] = None if state.scaler is None else state.scaler.state_dict()
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    averaged = {} if state.ema is None else state.ema.tensors()
    size = sum(value.nbytes for part in (tensors, moments, averaged) for value in part.values())
    with atomic_folder(folder, size) as partial:
        write_safetensors(partial / "parameters.safetensors", tensors, {"format": "pt"})
        write_safetensors(partial / "optimizer.safetensors", moments, {"format": "pt"})
        if averaged:
            write_safetensors(partial / "average.safetensors", averaged, {"format": "pt"})
        said["sha256"] = {file.name: _sum_of(file) for file in sorted(partial.glob("*.safetensors"))}
        _write_state(partial, said)
    older = checkpoints(run)[: checkpoints(run).index(folder)]
    staying = [old for old in older if _was_due(old)][1 - keep :]
    for old in older:
        if old not in staying:
            remove_dir(old)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def restore(run: Path, fingerprint: Fingerprint, state: TrainingState, *, allow_changes: bool = False) -> None:
    """Put the newest checkpoint that can be read back into `state`, in place; without one it is at step 0.

    Raises:
        DiffgraftError: the base, the pictures or the recipe differ from those of the checkpoint without
            `allow_changes`, or its parameters have other names or shapes.
    """
    parameters = state.parameters
    for folder in reversed(checkpoints(run)):
        try:
            said = _state(folder)
            _verify_files(folder, said)
            values, moments = load_file(folder / "parameters.safetensors"), load_file(folder / "optimizer.safetensors")
            averaged = load_file(file) if (file := folder / "average.safetensors").exists() else None
            if not differences(said["identity"], fingerprint) and (misfit := _misfit(folder, parameters)):
                raise ValueError(misfit)
        except (OSError, ValueError, SafetensorError) as error:
            warnings.warn(f"The checkpoint {folder} is damaged ({error}); an earlier one is used.", stacklevel=2)
            continue
        _compare(folder, said, fingerprint, parameters, allow_changes=allow_changes)
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
        if state.ema is not None:
            state.ema.load(averaged)
        if state.scaler is not None and said["scaler"]:
            state.scaler.load_state_dict(said["scaler"])
        if said["identity"]["recipe"]["optimizer"] == fingerprint["recipe"]["optimizer"]:
            places = {name: place for place, name in enumerate(_names(parameters, state.optimizer))}
            _restore_optimizer(state.optimizer, said, moments, places)
        state.step = int(said["step"])
        return
    state.step = 0


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, said: Mapping[str, Any], moments: Mapping[str, Tensor], places: Mapping[str, int]
) -> None:
    state: dict[int, dict[str, Any]] = {places[name]: dict(entry) for name, entry in said["optimizer"].items()}
    for key_and_name, value in moments.items():
        key, _, name = key_and_name.partition(" ")
        state.setdefault(places[name], {})[key] = value.clone()  # what was read may be the file itself, mapped
    groups = optimizer.state_dict()["param_groups"]
    for group, kept in zip(groups, said["groups"], strict=False):
        group.update(kept)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_same(
    run: Path, identity: Fingerprint, parameters: Mapping[str, nn.Parameter], *, allow_changes: bool = False
) -> int:
    """The step of the newest checkpoint, and 0 without one; what `restore` would refuse of it is refused at once.

    Raises:
        DiffgraftError: as `restore`, as far as it can be seen without the pictures.
    """
    for folder in reversed(checkpoints(run)):
        with suppress(OSError, ValueError):  # damaged: `restore` tells of it
            said = _state(folder)
            _compare(folder, said, identity, parameters, allow_changes=allow_changes)
            return int(said["step"])
    return 0


def with_changes(run: Path, identity: Fingerprint) -> Fingerprint:
    """`identity`, telling of what has changed since the newest checkpoint, and before."""
    for folder in reversed(checkpoints(run)):
        with suppress(OSError, ValueError):  # damaged
            said = _state(folder)
            return after(said["identity"], said["step"], identity)
    return identity


def accept_changes(run: Path, identity: Fingerprint) -> None:
    """Write into the checkpoints that what differs from `identity` was changed on purpose."""
    for folder in checkpoints(run):
        with suppress(OSError, ValueError):  # damaged
            if (said := _state(folder))["identity"] != identity:
                _write_state(folder, {**said, "identity": identity})


def _compare(
    folder: Path,
    said: Mapping[str, Any],
    identity: Fingerprint,
    parameters: Mapping[str, nn.Parameter],
    *,
    allow_changes: bool,
) -> None:
    apart = differences(said["identity"], identity)
    if not apart:
        return
    told = f"Settings differ from those of the first {said['step']} steps of {folder.parents[1]}: {'; '.join(apart)}."
    back = "restore the former settings, or start a new run with another output=…"
    if misfit := _misfit(folder, parameters):
        raise DiffgraftError(f"{told} A run cannot continue with that change, as {misfit}: {back}")
    if not allow_changes:
        meant = "To continue with them, add --allow-changes (in Python, allow_changes=True)"
        raise DiffgraftError(f"{told} {meant}; otherwise {back}")


def _misfit(folder: Path, parameters: Mapping[str, nn.Parameter]) -> str:
    """How the parameters in a checkpoint differ from these; empty where they fit."""
    try:
        with safe_open(folder / "parameters.safetensors", "pt") as file:
            kept = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return ""
    now = {name: tuple(value.shape) for name, value in parameters.items()}
    apart = sorted(name for name in kept.keys() | now.keys() if kept.get(name) != now.get(name))
    if not apart:
        return ""
    before, after = (str(side.get(apart[0], "not there")) for side in (kept, now))
    return f"{len(apart)} of its parameters would not fit, such as {apart[0]}, which was {before} and would be {after}"


def _names(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters in the order in which the optimiser counts them."""
    names = {id(value): name for name, value in parameters.items()}
    return [names[id(value)] for group in optimizer.param_groups for value in group["params"]]


def _state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises OSError or ValueError where that is not what was written."""
    try:
        found = json.loads((folder / "state.json").read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("state.json is nested too deeply") from error
    if not isinstance(found, dict) or not all(type(found.get(key)) is kind for key, kind in _STATE.items()):
        raise ValueError("state.json does not say what a checkpoint says")
    # those of earlier releases have no sums
    if "sha256" in found and (not isinstance(found["sha256"], dict) or found["sha256"].get("state") != _sum(found)):
        raise ValueError("state.json is not what was written")
    return found


def _write_state(folder: Path, said: dict[str, Any]) -> None:
    if "sha256" in said:
        said = {**said, "sha256": {**said["sha256"], "state": _sum(said)}}
    write_text(folder / "state.json", json.dumps(said, sort_keys=True))


def _sum(said: Mapping[str, Any]) -> str:
    """SHA-256 of a state, without its own."""
    others = {name: value for name, value in said["sha256"].items() if name != "state"}
    return hashlib.sha256(json.dumps({**said, "sha256": others}, sort_keys=True).encode()).hexdigest()


def _sum_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _verify_files(folder: Path, said: Mapping[str, Any]) -> None:
    """Raises OSError or ValueError where the files of a checkpoint are not those that were written."""
    kept = {name: value for name, value in said.get("sha256", {}).items() if name != "state"}
    for name, wanted in kept.items():
        if not _FILE.fullmatch(name) or _sum_of(folder / name) != wanted:
            raise ValueError(f"{name} is not what was written")


def _was_due(folder: Path) -> bool:
    try:
        return bool(_state(folder)["is_due"])
    except (OSError, ValueError):
        return False
