"""Loading adapter files: recognised by their keys, and read whole or refused."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.dora import with_strength_convention
from diffgraft.adapters.formats.families import as_diffusers, with_base, with_family
from diffgraft.adapters.formats.key_errors import UnknownKeyError, is_for_a_transformer, made_for, misspelt
from diffgraft.adapters.formats.reader import open_file
from diffgraft.adapters.ops.effect import fit_together
from diffgraft.adapters.registry import dialects
from diffgraft.bases.checkpoint_files import is_checkpoint, is_checkpoint_key
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError, one_line, wrap_system_errors

_OF_RUNS = "adapter.safetensors"
"""The adapter in the folder of a training run"""


@wrap_system_errors
def load_adapter(path: str | PathLike[str], layers: int | None = None) -> Adapter:
    """Read an adapter file in any dialect known; of a run, the adapter that it left.

    Args:
        path: a file, a folder of peft's, or a run's.
        layers: layers in a block of the UNet of the base it is for, where that is known: names of the original layout
            are counted by it.

    Raises:
        DiffgraftError: `path` is no path, or the file is missing, damaged, or holds a key that no dialect can place.
    """
    try:
        path = Path(path).expanduser()
    except TypeError as error:
        raise DiffgraftError(f"{path!r} is no path of an adapter file.") from error
    if is_checkpoint(path):
        raise DiffgraftError(
            f"{path} is a whole checkpoint and no adapter. Draw with it by --base, or make an adapter of it with "
            "`diffgraft extract`."
        )
    tensors, header = _opened(path)
    _refuse_broken_values(path, tensors)
    if any(map(is_checkpoint_key, (key.removeprefix("state_dict.") for key in tensors))):
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
    try:
        found = read_contents(tensors, header, layers)
    except UnreadableError as error:
        raise DiffgraftError(f"{path} cannot be read: {error}.") from error
    if found is None:
        sample = ", ".join(one_line(key, 80) for key in list(tensors)[:3]) or "none"
        known = [name for name, dialect in dialects().items() if dialect.recognises is not None]
        raise DiffgraftError(
            f"{path} holds no adapter that is known here: its keys are of no known dialect (first keys: {sample}). "
            f"Read are: {', '.join(known)}."
        )
    adapter, _ = found
    if strange := misspelt(adapter.modules):
        warnings.warn(f"{path}: {strange}", stacklevel=2)
    return adapter


def load_for_base(path: str | PathLike[str], weights: Weights | None) -> Adapter:
    """Read an adapter file like `load_adapter`, its names counted as in the base whose `weights` are given."""
    return load_adapter(path, weights.layers_in_block if weights is not None else None)


class UnreadableError(ValueError):
    """What is in a file is of a known dialect, and cannot be read; the message says why, without a full stop."""


def read_contents(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], layers: int | None = None
) -> tuple[Adapter, Dialect] | None:
    """The adapter that is in a file, and the dialect that reads it; None where no dialect recognises it.

    Args:
        tensors: by key.
        header: of strings.
        layers: layers in a block of the UNet of the base that it is for, where that is known.

    Raises:
        UnreadableError: there is a key without a place, or tensors do not fit together.
    """
    for dialect in dialects().values():
        if dialect.recognises is None or dialect.read is None or not dialect.recognises(tensors, header):
            continue
        try:
            found = dialect.read(tensors, header, layers)
            _check(found)
            return as_diffusers(with_family(_with_layers(_following(found), layers))), dialect
        except UnknownKeyError as error:
            rest = made_for(dialect.read, tensors, header, error)
            raise UnreadableError(f"{one_line(error)}{rest}") from error
        except (ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            raise UnreadableError(one_line(error).rstrip(".")) from error
    return None


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file, of the files in a folder that a dialect opens, or of what a run has left."""
    if (path / _OF_RUNS).is_file():
        return open_file(path / _OF_RUNS)
    for dialect in dialects().values():
        if dialect.open is not None and (found := dialect.open(path)) is not None:
            return found
    return open_file(path)


def _with_layers(adapter: Adapter, layers: int | None) -> Adapter:
    """The adapter with the layers in a block of its base in the metadata, where there are not two, as usual."""
    if layers in (None, 2) or not any(path.startswith("unet.") for path in adapter.deltas):
        return adapter
    return with_base(adapter, layers_per_block=layers)


def _check(adapter: Adapter) -> None:
    """Raises ValueError where something is empty, or no list of vectors, whatever the dialect lets through."""
    for path, deltas in adapter.deltas.items():
        for delta in deltas:
            for name, leaf in delta.leaves.items():
                if leaf.numel() == 0:
                    raise ValueError(f"{name} of {path} is {list(leaf.shape)}, which holds no numbers")
            _ = delta.weight_shape  # which raises where leaves have too many axes, or too few
            if delta.alpha is not None and not math.isfinite(delta.alpha):
                raise ValueError(f"the alpha of {path} is {delta.alpha}, which is no number")
        if not fit_together(deltas):
            what = "the leaves of" if len(deltas) == 1 else f"the {len(deltas)} changes under different names of"
            raise ValueError(f"{what} {path} are not for a weight of one shape")
    for word, vectors in adapter.tokens.items():
        for part, rows in vectors.items():
            if rows.ndim != 2 or rows.numel() == 0:
                raise ValueError(f"the word {word} has {list(rows.shape)} for {part}, which is no list of vectors")


def _following(adapter: Adapter) -> Adapter:
    """The adapter, with strengths as the tool has them that wrote it, where tools differ in them."""
    tool = adapter.metadata.get("dora")
    if tool is None:
        return adapter
    deltas = {
        path: tuple(with_strength_convention(delta, str(tool)) for delta in own) for path, own in adapter.deltas.items()
    }
    return replace(adapter, deltas=deltas)


def _refuse_broken_values(path: Path, tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        # an alpha is checked where it is read: of a LoKr of whole factors it means nothing, and may be infinite
        if value.is_floating_point() and not key.endswith(".alpha") and not value.isfinite().all():
            raise DiffgraftError(
                f"{path} holds values that are no numbers (NaN or infinite) in {key}; a picture made with it would be "
                "black. The training run it came from diverged: use an earlier checkpoint or a lower learning rate."
            )
