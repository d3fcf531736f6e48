"""Checkpoints: adapter, optimiser state and step, in safetensors and JSON; written whole or not at all."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffgraft.files import write_safetensors, write_text


def save_checkpoint(
    run: Path, step: int, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, keep: int = 2
) -> Path:
    """Write ``checkpoints/step-NNNNNN`` of the run's folder; older ones than the last `keep` are deleted."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    partial = folder.with_name("." + folder.name)
    shutil.rmtree(partial, ignore_errors=True)
    tensors = {name: value.detach().cpu() for name, value in parameters.items()}
    write_safetensors(partial / "parameters.safetensors", tensors, {"format": "pt"})
    moments: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                moments[f"{index}.{name}"] = value.detach().cpu().contiguous().clone()
            else:
                numbers.setdefault(str(index), {})[name] = value
    write_safetensors(partial / "optimizer.safetensors", moments, {"format": "pt"})
    write_text(partial / "state.json", json.dumps({"step": step, "optimizer": numbers}, sort_keys=True))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def load_checkpoint(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint's values back, in place, and return its step.

    Raises:
        ValueError: it holds other parameters than those given.
    """
    saved = load_file(folder / "parameters.safetensors")
    if set(saved) != set(parameters):
        raise ValueError(f"{folder} holds {len(saved)} parameters, not the {len(parameters)} of this recipe")
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)
    said = json.loads((folder / "state.json").read_text("utf-8"))
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in said["optimizer"].items()}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(said["step"])
