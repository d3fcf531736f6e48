"""Loading of adapter files, which are recognised by their keys, and read completely or refused."""

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
from diffgraft.adapters.formats.families import with_base, with_diffusers_projections, with_family
from diffgraft.adapters.formats.header import with_rank_schedule
from diffgraft.adapters.formats.key_errors import (
    UnknownKeyError,
    describe_fitting_bases,
    describe_unknown_modules,
    is_for_unknown_transformer,
)
from diffgraft.adapters.formats.reader import open_file
from diffgraft.adapters.ops.effect import have_one_shape
from diffgraft.adapters.registry import dialects
from diffgraft.bases.checkpoint_files import is_checkpoint, is_checkpoint_key
from diffgraft.bases.registry import families
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError, one_line, wrap_system_errors

_RUN_ADAPTER = "adapter.safetensors"
"""Name of the adapter in the folder of a training run"""


@wrap_system_errors
def load_adapter(path: str | PathLike[str], layers: int | None = None) -> Adapter:
    """Read an adapter file in any known dialect.

    Args:
        path: a file, a folder written by peft, or the folder of a training run.
        layers: layers per block of the base's UNet, if known; module names of the original layout depend on it.

    Raises:
        DiffgraftError: `path` is not a path, or the file is missing, damaged, or holds a key that no dialect knows.
    """
    try:
        path = Path(path).expanduser()
    except TypeError as error:
        raise DiffgraftError(f"Invalid adapter path {path!r}: expected text or a path.") from error
    if is_checkpoint(path):
        raise DiffgraftError(
            f"{path} is a whole checkpoint, not an adapter. Generate with it by --base, or make an adapter of it with "
            "`diffgraft extract`."
        )
    tensors, header = _open(path)
    _refuse_broken_values(path, tensors)
    if any(map(is_checkpoint_key, (key.removeprefix("state_dict.") for key in tensors))):
        raise DiffgraftError(
            f"{path} is a whole checkpoint, not an adapter. It cannot be used as a base either, as {path.suffix} files "
            "can contain code: download it as .safetensors."
        )
    if is_for_unknown_transformer(tensors):
        supported = ", ".join(families())
        raise DiffgraftError(
            f"{path} is for a base of an unknown family, whose denoiser is a transformer (first key: "
            f"{one_line(next(iter(tensors)), 100)}). Supported families are {supported}."
        )
    try:
        contents = read_contents(tensors, header, layers)
    except UnreadableError as error:
        raise DiffgraftError(f"{path} cannot be read: {error}.") from error
    if contents is None:
        sample = ", ".join(one_line(key, 80) for key in list(tensors)[:3]) or "none"
        known = [name for name, dialect in dialects().items() if dialect.recognises is not None]
        raise DiffgraftError(
            f"{path} holds no known kind of adapter: its keys are of no known dialect (first keys: {sample}). "
            f"Supported are {', '.join(known)}."
        )
    adapter, _ = contents
    if warning := describe_unknown_modules(adapter.modules):
        warnings.warn(f"{path}: {warning}", stacklevel=2)
    return adapter


def load_for_base(path: str | PathLike[str], weights: Weights | None) -> Adapter:
    """Read an adapter file like `load_adapter`, with the layers per block of the base that `weights` belong to."""
    return load_adapter(path, weights.layers_per_block if weights is not None else None)


class UnreadableError(ValueError):
    """The contents of a file belong to a known dialect, but are invalid; the message ends without a full stop."""


def read_contents(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], layers: int | None = None
) -> tuple[Adapter, Dialect] | None:
    """Build the adapter that is in a file; returns it and its dialect, or None if no dialect recognises the contents.

    Args:
        tensors: tensors by key.
        header: header of strings.
        layers: layers per block of the base's UNet, if known.

    Raises:
        UnreadableError: a key is unknown, or tensors do not fit together.
    """
    for dialect in dialects().values():
        if dialect.recognises is None or dialect.read is None or not dialect.recognises(tensors, header):
            continue
        try:
            adapter = dialect.read(tensors, header, layers)
            _check(adapter)
            adapter = with_rank_schedule(with_family(_with_layers(_with_dora_convention(adapter), layers)))
            return with_diffusers_projections(adapter), dialect
        except UnknownKeyError as error:
            bases = describe_fitting_bases(dialect.read, tensors, header, error)
            raise UnreadableError(f"{one_line(error)}{bases}") from error
        except (ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            raise UnreadableError(one_line(error).rstrip(".")) from error
    return None


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file, of a folder that a dialect opens, or of the adapter in a run's folder."""
    if (path / _RUN_ADAPTER).is_file():
        return open_file(path / _RUN_ADAPTER)
    for dialect in dialects().values():
        if dialect.open is not None and (contents := dialect.open(path)) is not None:
            return contents
    return open_file(path)


def _with_layers(adapter: Adapter, layers: int | None) -> Adapter:
    """Add the base's layers per block to the metadata, if the number is known and not the usual 2."""
    if layers in (None, 2) or not any(path.startswith("unet.") for path in adapter.deltas):
        return adapter
    return with_base(adapter, layers_per_block=layers)


def _check(adapter: Adapter) -> None:
    """Raise ValueError for empty tensors, invalid alphas and wrong numbers of axes, whatever the dialect accepts."""
    for path, deltas in adapter.deltas.items():
        for delta in deltas:
            for name, leaf in delta.leaves.items():
                if leaf.numel() == 0:
                    raise ValueError(f"{name} of {path} has shape {list(leaf.shape)}, without any values")
            _ = delta.weight_shape  # raises if leaves have too many or too few axes
            if delta.alpha is not None and not math.isfinite(delta.alpha):
                raise ValueError(f"the alpha of {path} is {delta.alpha}; expected a finite number")
        if not have_one_shape(deltas):
            subject = "the leaves of" if len(deltas) == 1 else f"the {len(deltas)} deltas under different names of"
            raise ValueError(f"{subject} {path} are not for a weight of one shape")
    for word, vectors in adapter.tokens.items():
        for part, rows in vectors.items():
            if rows.ndim != 2 or rows.numel() == 0:
                raise ValueError(f"the word {word} has {list(rows.shape)} for {part}; expected embeddings [n, width]")


def _with_dora_convention(adapter: Adapter) -> Adapter:
    """Apply the strength convention of DoRA that the metadata entry ``dora`` names, if there is one."""
    tool = adapter.metadata.get("dora")
    if tool is None:
        return adapter
    deltas = {
        path: tuple(with_strength_convention(delta, str(tool)) for delta in module_deltas)
        for path, module_deltas in adapter.deltas.items()
    }
    return replace(adapter, deltas=deltas)


def _refuse_broken_values(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise DiffgraftError if a tensor holds NaN or infinite values."""
    for key, value in tensors.items():
        # an alpha is checked where it is read: in a LoKr of unsplit factors it is unused, and may be infinite
        if value.is_floating_point() and not key.endswith(".alpha") and not value.isfinite().all():
            raise DiffgraftError(
                f"{path} holds NaN or infinite values in {key}; pictures made with it would be black. The training run "
                "it came from diverged: use an earlier checkpoint or a lower learning rate."
            )
