"""The adapter in a checkpoint of a run, as the run would have saved it at that step."""

import hashlib
from pathlib import Path

import torch

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.hooks.checkpoint import saved_parameters
from diffgraft.trainers.run.adapter_file import read_adapter_file
from diffgraft.trainers.run.attach import attach
from diffgraft.trainers.run.folder import recipe_with


def checkpoint_adapter(folder: Path, base: Base) -> Adapter:
    """Return the adapter in a checkpoint: that of the EMA if the run has one.

    Args:
        folder: the checkpoint's folder, in that of its run.
        base: base of the run; it is the same afterwards.

    Raises:
        DiffgraftError: the checkpoint is damaged, or recipe and base are not those of the run.
    """
    try:
        values = saved_parameters(folder)
    except (OSError, ValueError) as error:
        raise DiffgraftError(f"The checkpoint {folder} is damaged ({error}): remove it.") from error
    recipe = recipe_with(folder.parents[1] / "recipe.yaml", {})
    start = read_adapter_file(recipe.init_from, base) if recipe.init_from and Path(recipe.init_from).exists() else None
    live = attach(recipe, base, start)
    try:
        parameters = live.trainable()
        fits = all(name in parameters and parameters[name].shape == value.shape for name, value in values.items())
        if not fits:
            raise DiffgraftError(
                f"The checkpoint {folder} does not fit the recipe of its run, or the base {base.name}."
            )
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
        header = {"method": recipe.method, "trigger": recipe.trigger, "class": recipe.data.noun or None}
        return live.adapter(header)
    finally:
        live.detach()


def checkpoint_hash(folder: Path) -> str:
    """Return the SHA-256 of what the adapter in a checkpoint depends on."""
    digest = hashlib.sha256()
    for name in ("parameters.safetensors", "average.safetensors"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()
