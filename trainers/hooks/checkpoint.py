"""Checkpoints of a run: parameters, optimizer state and step, in safetensors and JSON, written atomically.

``state.json`` holds the SHA-256 of every file, itself included, so that a corrupted checkpoint is never resumed.
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
from diffgraft.trainers.hooks.ema import averages_in
from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.hooks.metrics import Metrics
from diffgraft.trainers.run.fingerprint import Fingerprint, differences, record_changes
from diffgraft.trainers.runtime.interrupts import defer_sigint
from diffgraft.trainers.state import TrainingState

_BNB_STATE = "__bnb_optimizer_quant_state__"
"""Key under which bitsandbytes nests its 8-bit state so that no tool casts it; it also loads from the plain names"""
_FOLDER_NAME = re.compile(r"step-\d{6,12}")
"""Name of a checkpoint's folder; copies that a person made beside it under other names are left alone"""
_FILE_NAME = re.compile(r"\w+\.safetensors")
_STATE_TYPES = {"step": int, "is_due": bool, "identity": dict, "optimizer": dict, "groups": list}
"""Keys that every ``state.json`` has, and the types of their values"""
_SCALAR_TYPES = (bool, int, float)
"""Types saved from an optimizer's parameter groups: some optimizers keep a step count or a learning rate there"""
_RECIPE_KEYS = ("lr", "rate", "weight_decay")
"""Keys of the parameter groups that are not saved, since the recipe sets them"""


class CheckpointHook(Hook):
    """Writes a checkpoint every `every` steps, on request, at the end of the run, and when the run is interrupted."""

    name = "checkpoint"

    def __init__(self, folder: Path, fingerprint: Fingerprint, every: int, metrics: Metrics) -> None:
        """Store where and how often to write.

        Args:
            folder: the run's folder.
            fingerprint: the run's fingerprint, written into each checkpoint.
            every: steps between checkpoints; with 0 there is a single one, at the end.
            metrics: flushed to disk before each checkpoint.
        """
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
        """Write a checkpoint if steps were taken since the newest one."""
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
    """Write ``checkpoints/step-NNNNNN`` in the folder `run`, keep the newest `keep` checkpoints, and return its path.

    Older checkpoints that were not due, but written at an interruption, are deleted as well: an interrupted run leaves
    the same checkpoints as an uninterrupted one.
    """
    parameters, optimizer = state.parameters, state.optimizer
    tensors = {name: value.detach().cpu() for name, value in parameters.items()}
    moments: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    names = _names_in_order(parameters, optimizer)
    for index, parameter_state in optimizer.state_dict()["state"].items():
        for key, value in {**parameter_state, **parameter_state.get(_BNB_STATE, {})}.items():
            if isinstance(value, Tensor):
                moments[f"{key} {names[index]}"] = value.detach().cpu().contiguous().clone()
            elif key != _BNB_STATE:
                scalars.setdefault(names[index], {})[key] = value
    groups = [
        {key: value for key, value in group.items() if type(value) in _SCALAR_TYPES and key not in _RECIPE_KEYS}
        for group in optimizer.param_groups
    ]
    saved = {"step": state.step, "is_due": is_due, "identity": fingerprint, "optimizer": scalars, "groups": groups}
    saved["scaler"] = None if state.scaler is None else state.scaler.state_dict()
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    ema = {} if state.ema is None else state.ema.tensors()
    size = sum(value.nbytes for group in (tensors, moments, ema) for value in group.values())
    with atomic_folder(folder, size) as partial:
        write_safetensors(partial / "parameters.safetensors", tensors, {"format": "pt"})
        write_safetensors(partial / "optimizer.safetensors", moments, {"format": "pt"})
        if ema:
            write_safetensors(partial / "average.safetensors", ema, {"format": "pt"})
        saved["sha256"] = {file.name: _file_sha256(file) for file in sorted(partial.glob("*.safetensors"))}
        _write_state(partial, saved)
    older = checkpoints(run)[: checkpoints(run).index(folder)]
    retained = [old for old in older if _was_due(old)][1 - keep :]
    for old in older:
        if old not in retained:
            remove_dir(old)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """Folders of a run's checkpoints, oldest first."""
    candidates = (run / "checkpoints").glob("step-*")
    folders = [path for path in candidates if _FOLDER_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def restore(run: Path, fingerprint: Fingerprint, state: TrainingState, *, allow_changes: bool = False) -> None:
    """Load the newest intact checkpoint into `state`, in place; without a checkpoint, set `state.step` to 0.

    Damaged checkpoints are skipped with a warning.

    Raises:
        DiffgraftError: the checkpoint was made with another base, other images or another recipe, without
            `allow_changes`; or the names or shapes of its parameters differ.
    """
    parameters = state.parameters
    for folder in reversed(checkpoints(run)):
        try:
            saved = _read_state(folder)
            _verify_files(folder, saved)
            values, moments = load_file(folder / "parameters.safetensors"), load_file(folder / "optimizer.safetensors")
            ema = load_file(file) if (file := folder / "average.safetensors").exists() else None
            if not differences(saved["identity"], fingerprint) and (mismatch := _shape_mismatch(folder, parameters)):
                raise ValueError(mismatch)
        except (OSError, ValueError, SafetensorError) as error:
            warnings.warn(f"The checkpoint {folder} is damaged ({error}); an earlier one is used.", stacklevel=2)
            continue
        _check_unchanged(folder, saved, fingerprint, parameters, allow_changes=allow_changes)
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
        if state.ema is not None:
            state.ema.load(ema)
        if state.scaler is not None and saved["scaler"]:
            state.scaler.load_state_dict(saved["scaler"])
        if saved["identity"]["recipe"]["optimizer"] == fingerprint["recipe"]["optimizer"]:
            indices = {name: index for index, name in enumerate(_names_in_order(parameters, state.optimizer))}
            _restore_optimizer(state.optimizer, saved, moments, indices)
        state.step = int(saved["step"])
        return
    state.step = 0


def saved_parameters(folder: Path) -> dict[str, Tensor]:
    """Return the parameters in a checkpoint by name, with the values of its EMA if it has one, as adapters are saved.

    Raises:
        OSError, ValueError: a file is missing or damaged.
    """
    _verify_files(folder, _read_state(folder))
    try:
        if (file := folder / "average.safetensors").exists():
            return averages_in(load_file(file))
        return load_file(folder / "parameters.safetensors")
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _restore_optimizer(
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    moments: Mapping[str, Tensor],
    indices: Mapping[str, int],
) -> None:
    """Load an optimizer's state; `indices` maps each parameter's name to its index in the optimizer."""
    state: dict[int, dict[str, Any]] = {indices[name]: dict(scalars) for name, scalars in saved["optimizer"].items()}
    for key_and_name, value in moments.items():
        key, _, name = key_and_name.partition(" ")
        state.setdefault(indices[name], {})[key] = value.clone()  # loaded tensors may be memory-mapped from the file
    groups = optimizer.state_dict()["param_groups"]
    for group, scalars in zip(groups, saved["groups"], strict=False):
        group.update(scalars)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_same(
    run: Path, fingerprint: Fingerprint, parameters: Mapping[str, nn.Parameter], *, allow_changes: bool = False
) -> int:
    """Step of the newest readable checkpoint, after the checks of `restore` that need no images; 0 without one.

    Raises:
        DiffgraftError: as in `restore`.
    """
    for folder in reversed(checkpoints(run)):
        with suppress(OSError, ValueError):  # damaged: `restore` warns about it
            saved = _read_state(folder)
            _check_unchanged(folder, saved, fingerprint, parameters, allow_changes=allow_changes)
            return int(saved["step"])
    return 0


def with_changes(run: Path, fingerprint: Fingerprint) -> Fingerprint:
    """Return `fingerprint` with the run's history of changed settings and data.

    These are the changes in its newest checkpoint, and the differences between that checkpoint and `fingerprint`.
    """
    for folder in reversed(checkpoints(run)):
        with suppress(OSError, ValueError):  # damaged
            saved = _read_state(folder)
            return record_changes(saved["identity"], saved["step"], fingerprint)
    return fingerprint


def accept_changes(run: Path, fingerprint: Fingerprint) -> None:
    """Write `fingerprint` into the run's checkpoints, so that the next resume accepts its differences from theirs."""
    for folder in checkpoints(run):
        with suppress(OSError, ValueError):  # damaged
            if (saved := _read_state(folder))["identity"] != fingerprint:
                _write_state(folder, {**saved, "identity": fingerprint})


def _check_unchanged(
    folder: Path,
    saved: Mapping[str, Any],
    fingerprint: Fingerprint,
    parameters: Mapping[str, nn.Parameter],
    *,
    allow_changes: bool,
) -> None:
    """Raise DiffgraftError if a checkpoint differs from the run in a way that cannot be resumed, or is not allowed."""
    changes = differences(saved["identity"], fingerprint)
    if not changes:
        return
    message = f"Settings differ from those of the first {saved['step']} steps of {folder.parents[1]}: "
    message += f"{'; '.join(changes)}."
    undo = "restore the old settings, or start a new run with another output=…"
    if mismatch := _shape_mismatch(folder, parameters):
        raise DiffgraftError(f"{message} A run cannot be resumed with this change, as {mismatch}: {undo}")
    if not allow_changes:
        allow = "If that is intended, add --allow-changes (in Python, allow_changes=True)"
        raise DiffgraftError(f"{message} {allow}; otherwise {undo}")


def _shape_mismatch(folder: Path, parameters: Mapping[str, nn.Parameter]) -> str:
    """How the names and shapes of a checkpoint's parameters differ from `parameters`; empty if they are equal."""
    try:
        with safe_open(folder / "parameters.safetensors", "pt") as file:
            old = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return ""
    new = {name: tuple(value.shape) for name, value in parameters.items()}
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if not changed:
        return ""
    before, after = (str(shapes.get(changed[0], "missing")) for shapes in (old, new))
    return f"{len(changed)} of its parameters do not fit (e.g. {changed[0]}: was {before}, is now {after})"


def _names_in_order(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters, in the order of the optimizer's indices."""
    names = {id(value): name for name, value in parameters.items()}
    return [names[id(value)] for group in optimizer.param_groups for value in group["params"]]


def _read_state(folder: Path) -> dict[str, Any]:
    """Content of a checkpoint's ``state.json``. Raises OSError or ValueError if it is missing or damaged."""
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("state.json is nested too deeply") from error
    if not isinstance(state, dict) or not all(type(state.get(key)) is kind for key, kind in _STATE_TYPES.items()):
        raise ValueError("state.json lacks keys, or their values have wrong types")
    # checkpoints of earlier releases have no checksums
    if "sha256" in state and (
        not isinstance(state["sha256"], dict) or state["sha256"].get("state") != _state_sha256(state)
    ):
        raise ValueError("state.json does not match its checksum")
    return state


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    if "sha256" in state:
        state = {**state, "sha256": {**state["sha256"], "state": _state_sha256(state)}}
    write_text(folder / "state.json", json.dumps(state, sort_keys=True))


def _state_sha256(state: Mapping[str, Any]) -> str:
    """SHA-256 of the content of a ``state.json``, without its own checksum."""
    files = {name: value for name, value in state["sha256"].items() if name != "state"}
    return hashlib.sha256(json.dumps({**state, "sha256": files}, sort_keys=True).encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _verify_files(folder: Path, state: Mapping[str, Any]) -> None:
    """Raise OSError or ValueError if a file of a checkpoint is missing or does not match its checksum."""
    checksums = {name: value for name, value in state.get("sha256", {}).items() if name != "state"}
    for name, checksum in checksums.items():
        if not _FILE_NAME.fullmatch(name) or _file_sha256(folder / name) != checksum:
            raise ValueError(f"{name} does not match its checksum")


def _was_due(folder: Path) -> bool:
    """Whether a checkpoint was written at its regular step, not at an interruption."""
    try:
        return bool(_read_state(folder)["is_due"])
    except (OSError, ValueError):
        return False
