"""Adapter files: found by looking at their keys, read whole or refused, written under a temporary name first."""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import ModuleType

from torch import Tensor

from diffgraft.adapters.adapter import Adapter, writes_adapters
from diffgraft.adapters.dora import DoraDelta, following
from diffgraft.adapters.families import as_diffusers, with_base, with_family
from diffgraft.adapters.formats import (
    aesthetic_embedding,
    cloneofsimo,
    custom_diffusion,
    diffusers_lora,
    dotted,
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
from diffgraft.adapters.ops.effect import fit_together, own_shape
from diffgraft.bases.stored import is_checkpoint, is_of_checkpoint
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError, in_a_sentence, nearest, one_line
from diffgraft.files import check_suffix, write_safetensors

DIALECTS: dict[str, ModuleType] = {
    "diffgraft": native,
    "peft": peft_folder,
    "comfyui": dotted,
    "diffusers": diffusers_lora,
    "lycoris": lycoris,
    "embedding": embedding,
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
AUTO = ("embedding", "kohya", "diffusers", "diffgraft")
"""What is tried where nothing is said: what more tools open, first; the last one holds anything."""


@in_a_sentence
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
    if any(map(is_of_checkpoint, (key.removeprefix("state_dict.") for key in tensors))):
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
                found = _read(dialect, tensors, header, layers)
                _check(found)
                if strange := misspelt(found.modules):
                    warnings.warn(f"{path}: {strange}", stacklevel=2)
                return as_diffusers(with_family(_with_layers(_following(found), layers)))
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
    sample = ", ".join(one_line(key, 80) for key in list(tensors)[:3]) or "none"
    raise DiffgraftError(
        f"{path} holds no adapter that is known here: its keys are of no known dialect (first keys: {sample}). "
        f"Read are: {', '.join(DIALECTS)}."
    )


def load_for_base(path: str | PathLike[str], weights: Weights | None) -> Adapter:
    """Read an adapter file like `load_adapter`, its names counted as in the base whose `weights` are given."""
    return load_adapter(path, weights.layers_in_block if weights is not None else None)


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
            own_shape(delta)  # which raises where leaves have too many axes, or too few
            if delta.alpha is not None and not math.isfinite(delta.alpha):
                raise ValueError(f"the alpha of {path} is {delta.alpha}, which is no number")
        if not fit_together(deltas):
            what = "the leaves of" if len(deltas) == 1 else f"the {len(deltas)} changes under different names of"
            raise ValueError(f"{what} {path} are not for a weight of one shape")
    for word, vectors in adapter.tokens.items():
        for part, rows in vectors.items():
            if rows.ndim != 2 or rows.numel() == 0:
                raise ValueError(f"the word {word} has {list(rows.shape)} for {part}, which is no list of vectors")


def _read(module: ModuleType, tensors: dict[str, Tensor], header: dict[str, str], layers: int | None) -> Adapter:
    """By the dialect of `module`; those in which names may be counted by layers are told how many there are."""
    found: Adapter = (
        module.read(tensors, header, layers) if module in (lycoris, dotted) else module.read(tensors, header)
    )
    return found


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
    found = {part: open_file(peft_folder.weights_in(folder)) for part, folder in parts.items()}
    return peft_folder.gathered(path, found)


@writes_adapters
def save_adapter(adapter: Adapter, path: Path, dialect: str = "auto") -> Path:
    """Write `adapter` to `path` in `dialect`; `auto` is the first one that can hold it.

    Raises:
        DiffgraftError: there is no such dialect, or it cannot hold the adapter; nothing is written then.
    """
    if not (adapter.deltas or adapter.tokens or adapter.networks):
        raise DiffgraftError(f"There is nothing to write into {path}: the adapter changes no layer and holds no word.")
    name, content = _written(adapter, dialect)
    module = DIALECTS[name]
    if content is None:
        try:
            saved: Path = module.save(adapter, path)
            return saved
        except ValueError as error:
            raise _cannot(dialect, error) from error
    check_suffix(path)
    return write_safetensors(path, *content)


def save_words(adapter: Adapter, folder: Path) -> list[Path]:
    """Write each word of an adapter into a file of its own, beside the weights that were trained with it.

    Of the programs that open adapter files with words in them, ComfyUI, Forge and InvokeAI take the weights alone.

    Returns:
        ``adapter.<word>.safetensors`` for each, with what no file system takes left out of the word.
    """
    return [
        save_adapter(only_word(adapter, word), folder / f"adapter.{_plain(word)}.safetensors", "webui")
        for word in adapter.tokens
    ]


def only_word(adapter: Adapter, word: str) -> Adapter:
    """An adapter that teaches one of the words of `adapter`, and changes no weights."""
    metadata = {**adapter.metadata, "method": "textual-inversion", "trigger": word}
    return Adapter({}, metadata, tokens={word: adapter.tokens[word]})


def _plain(word: str) -> str:
    return re.sub(r"[^\w.-]+", "", word) or "word"


def check_dialect(adapter: Adapter, dialect: str) -> None:
    """Raises DiffgraftError where `dialect` cannot hold the adapter; nothing is written."""
    _written(adapter, dialect)


def dialect_of(adapter: Adapter, dialect: str) -> str:
    """Name of the dialect that `save_adapter` writes: `dialect` itself, or what ``auto`` stands for.

    Raises:
        DiffgraftError: it cannot hold the adapter.
    """
    return dialect if dialect != "auto" else _written(adapter, dialect)[0]


def _written(adapter: Adapter, dialect: str) -> tuple[str, tuple[dict[str, Tensor], dict[str, str]] | None]:
    """Name of the dialect that holds the adapter, with tensors and header; None where it writes its files itself."""
    if dialect not in (*WRITTEN, "auto"):
        raise DiffgraftError(f"There is no adapter format {dialect!r} to write: {nearest(dialect, WRITTEN)}")
    for name in _preferred(adapter) if dialect == "auto" else (dialect,):
        module = DIALECTS[name]
        try:
            if adapter.networks and name not in ("diffgraft", "webui"):
                raise ValueError(f"it holds a {adapter.networks[0].kind}, for which these files have no place")
            return name, None if hasattr(module, "save") else module.write(adapter)
        except ValueError as error:
            last = error
    raise _cannot(dialect, last) from last


def _preferred(adapter: Adapter) -> Sequence[str]:
    """`AUTO`, with diffusers' layout first for LoRAs with DoRA: under kohya's names most programs misread those."""
    first = next(iter(adapter.deltas.values()), (None,))[0]
    if isinstance(first, DoraDelta) and first.kind == "lora":
        return ("diffusers", *(name for name in AUTO if name != "diffusers"))
    return AUTO


def _cannot(dialect: str, error: ValueError) -> DiffgraftError:
    return DiffgraftError(f"The adapter cannot be written in the format {dialect!r}: {error}.")


def _refuse_broken_values(path: Path, tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        # an alpha is checked where it is read: of a LoKr of whole factors it means nothing, and may be infinite
        if value.is_floating_point() and not key.endswith(".alpha") and not value.isfinite().all():
            raise DiffgraftError(
                f"{path} holds values that are no numbers (NaN or infinite) in {key}; a picture made with it would be "
                "black. The training run it came from diverged: use an earlier checkpoint or a lower learning rate."
            )
