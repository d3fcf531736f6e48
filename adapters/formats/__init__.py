"""Adapter files: found by looking at their keys, read whole or refused, written under a temporary name first."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dora import following
from diffgraft.adapters.formats import (
    aesthetic_embedding,
    cloneofsimo,
    custom_diffusion,
    diffusers_lora,
    embedding,
    kohya,
    lycoris,
    native,
    peft_folder,
    webui,
    webui_hypernetwork,
)
from diffgraft.adapters.formats.opened import open_file
from diffgraft.adapters.formats.unknown import UnknownKeyError, is_for_a_transformer, made_for, misspelt
from diffgraft.adapters.ops.effect import own_shape
from diffgraft.bases.stored import is_checkpoint
from diffgraft.errors import DiffgraftError, nearest, one_line
from diffgraft.files import check_suffix, write_safetensors

DIALECTS: dict[str, ModuleType] = {
    "peft": peft_folder,
    "diffusers": diffusers_lora,
    "lycoris": lycoris,
    "embedding": embedding,
    "diffgraft": native,
    "webui-hypernetwork": webui_hypernetwork,
    "cloneofsimo": cloneofsimo,
    "custom-diffusion": custom_diffusion,
    "aesthetic": aesthetic_embedding,
    "kohya": kohya,
    "webui": webui,
}
"""Name of a dialect → the module that reads it, and writes it where it is in `WRITTEN`."""

_OF_RUNS = "adapter.safetensors"
"""The adapter in the folder of a training run"""
WRITTEN = ("diffusers", "lycoris", "embedding", "diffgraft", "kohya", "webui", "peft")
AUTO = ("diffusers", "lycoris", "embedding", "diffgraft")
"""What is tried where nothing is said: what more tools open, first; the last one holds anything."""


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter file in any dialect known.

    Raises:
        DiffgraftError: the file is missing, damaged, or holds a key that no dialect can place.
    """
    path = Path(path).expanduser()
    if is_checkpoint(path):
        raise DiffgraftError(
            f"{path} is a whole checkpoint and no adapter. Draw with it by --base, or make an adapter of it with "
            "`diffgraft extract`."
        )
    tensors, header = _opened(path)
    _refuse_broken_values(path, tensors)
    if any("model.diffusion_model." in key for key in tensors):
        raise DiffgraftError(
            f"{path} is a whole checkpoint and no adapter; nor is it opened as a base, for {path.suffix} files can "
            "hold code: get it as .safetensors."
        )
    if is_for_a_transformer(tensors):
        raise DiffgraftError(
            f"{path} is for a base whose denoiser is a transformer, such as Flux or Stable Diffusion 3 (first key: "
            f"{one_line(next(iter(tensors)), 100)}). "
            "Known here are bases with a UNet: Stable Diffusion 1.x, 2.x and XL."
        )
    for dialect in DIALECTS.values():
        if dialect.recognises(tensors, header):
            try:
                found = dialect.read(tensors, header)
                _check(found)
                if strange := misspelt(found.modules):
                    warnings.warn(f"{path}: {strange}", stacklevel=2)
                return _following(found)
            except UnknownKeyError as error:
                rest = made_for(dialect.read, tensors, header, error)
                raise DiffgraftError(f"{path} cannot be read: {one_line(error)}{rest}.") from error
            except (
                ValueError,
                RuntimeError,
                ArithmeticError,
                LookupError,
            ) as error:
                raise DiffgraftError(f"{path} cannot be read: {one_line(error).rstrip('.')}.") from error
    sample = one_line(", ".join(list(tensors)[:3]) or "none")
    raise DiffgraftError(
        f"{path} holds no adapter that is known here: its keys are of no known dialect (first keys: {sample}). "
        f"Read are: {', '.join(DIALECTS)}."
    )


def _check(adapter: Adapter) -> None:
    """Raises ValueError where something is empty, or no list of vectors, whatever the dialect lets through."""
    for path, deltas in adapter.deltas.items():
        for delta in deltas:
            for name, leaf in delta.leaves.items():
                if leaf.numel() == 0:
                    raise ValueError(f"{name} of {path} is {list(leaf.shape)}, which holds no numbers")
            shape = own_shape(delta)  # which raises where leaves have too many axes, or too few
            if shape is not None and not delta.fits(shape):
                raise ValueError(f"the leaves of {path} do not fit together")
            if delta.alpha is not None and not math.isfinite(delta.alpha):
                raise ValueError(f"the alpha of {path} is {delta.alpha}, which is no number")
    for word, vectors in adapter.tokens.items():
        for part, rows in vectors.items():
            if rows.ndim != 2 or rows.numel() == 0:
                raise ValueError(f"the word {word} has {list(rows.shape)} for {part}, which is no list of vectors")


def _following(adapter: Adapter) -> Adapter:
    """The adapter, with strengths as the tool has them that wrote it, where tools differ in them."""
    tool = adapter.metadata.get("dora")
    if tool is None:
        return adapter
    deltas = {path: tuple(following(delta, str(tool)) for delta in own) for path, own in adapter.deltas.items()}
    return replace(adapter, deltas=deltas)


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file, of the files in a folder of peft's, or of what a run has left."""
    if (path / _OF_RUNS).is_file():
        return open_file(path / _OF_RUNS)
    parts = peft_folder.folders(path) if path.is_dir() else {}
    if not parts:
        return open_file(path)
    found = {part: open_file(folder / peft_folder.WEIGHTS) for part, folder in parts.items()}
    return peft_folder.gathered(path, found)


def save_adapter(adapter: Adapter, path: Path, dialect: str = "auto") -> Path:
    """Write `adapter` to `path` in `dialect`; `auto` is the first one that can hold it.

    Raises:
        DiffgraftError: there is no such dialect, or it cannot hold the adapter; nothing is written then.
    """
    if dialect not in (*WRITTEN, "auto"):
        raise DiffgraftError(f"There is no adapter format {dialect!r} to write: {nearest(dialect, WRITTEN)}")
    if not (adapter.deltas or adapter.tokens or adapter.networks):
        raise DiffgraftError(f"There is nothing to write into {path}: the adapter changes no layer and holds no word.")
    for name in AUTO if dialect == "auto" else (dialect,):
        module = DIALECTS[name]
        try:
            if adapter.networks and name not in ("diffgraft", "webui"):
                raise ValueError(f"it holds a {adapter.networks[0].kind}, for which these files have no place")
            if hasattr(module, "save"):
                saved: Path = module.save(adapter, path)
                return saved
            tensors, header = module.write(adapter)
        except ValueError as error:
            reason = str(error)
            continue
        check_suffix(path)
        return write_safetensors(path, tensors, header)
    raise DiffgraftError(f"The adapter cannot be written in the format {dialect!r}: {reason}.")


def _refuse_broken_values(path: Path, tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise DiffgraftError(
                f"{path} holds values that are no numbers (NaN or infinite) in {key}; a picture made with it would be "
                "black. The training run it came from diverged: use an earlier checkpoint or a lower learning rate."
            )
