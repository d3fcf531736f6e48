"""Checkpoints: adapter, optimiser state and step, in safetensors and JSON; written whole or not at all."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffgraft.errors import DiffgraftError
from diffgraft.files import discard, replacing_folder, write_safetensors, write_text
from diffgraft.trainers.average import Average

_EIGHT_BIT = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes hides an 8-bit state from tools that would cast it; it loads from the plain names as well."""
_PLAIN = (bool, int, float)
"""What is kept of an optimiser's groups: some count their steps there, or find their rate"""


def save_checkpoint(
    run: Path,
    step: int,
    identity: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: Average | None = None,
    *,
    is_due: bool = True,
    keep: int = 2,
) -> Path:
    """Write ``checkpoints/step-NNNNNN`` of the run's folder; older ones than the last `keep` are deleted.

    So are older ones that were not due, but came of an interruption: a run that was interrupted leaves the same
    checkpoints as one that was not.
    """
    tensors = {name: value.detach().cpu() for name, value in parameters.items()}
    moments: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in {**state, **state.get(_EIGHT_BIT, {})}.items():
            if isinstance(value, Tensor):
                moments[f"{index}.{name}"] = value.detach().cpu().contiguous().clone()
            elif name != _EIGHT_BIT:
                numbers.setdefault(str(index), {})[name] = value
    groups = [{key: value for key, value in group.items() if type(value) in _PLAIN} for group in optimizer.param_groups]
    said = {"step": step, "is_due": is_due, "identity": identity, "optimizer": numbers, "groups": groups}
    folder = run / "checkpoints" / f"step-{step:06d}"
    with replacing_folder(folder) as partial:
        write_safetensors(partial / "parameters.safetensors", tensors, {"format": "pt"})
        write_safetensors(partial / "optimizer.safetensors", moments, {"format": "pt"})
        if average is not None:
            write_safetensors(partial / "average.safetensors", average.tensors(), {"format": "pt"})
        write_text(partial / "state.json", json.dumps(said, sort_keys=True))
    older = checkpoints(run)[: checkpoints(run).index(folder)]
    staying = [old for old in older if _was_due(old)][1 - keep :]
    for old in older:
        if old not in staying:
            discard(old)
    return folder


def _was_due(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "state.json").read_text("utf-8"))["is_due"])
    except (OSError, ValueError, LookupError):
        return False


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))


def restore(
    run: Path,
    identity: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: Average | None = None,
) -> int:
    """Put back the values of the newest checkpoint that can be read, in place, and return its step; 0 without one.

    Raises:
        DiffgraftError: it was made with another base, other pictures, or another recipe.
    """
    for folder in reversed(checkpoints(run)):
        try:
            said = json.loads((folder / "state.json").read_text("utf-8"))
            values, moments = load_file(folder / "parameters.safetensors"), load_file(folder / "optimizer.safetensors")
            averaged = load_file(folder / "average.safetensors") if average is not None else {}
        except (OSError, ValueError, SafetensorError) as error:
            warnings.warn(f"The checkpoint {folder} is damaged ({error}); an earlier one is used.", stacklevel=2)
            continue
        if said["identity"] != identity:
            raise DiffgraftError(
                f"The checkpoint {folder} was made with another base, other pictures or another recipe than now. "
                "Put those back, or start a new run with another output=…"
            )
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
        if average is not None:
            average.load(averaged)
        state: dict[int, dict[str, Any]] = {int(index): dict(entry) for index, entry in said["optimizer"].items()}
        for key, value in moments.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value.clone()  # what was read may be the file itself, mapped
        groups = optimizer.state_dict()["param_groups"]
        for group, kept in zip(groups, said.get("groups", []), strict=False):
            group.update(kept)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return int(said["step"])
    return 0
