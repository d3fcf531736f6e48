"""Adapters on a live pipeline: merged into its weights while wanted, and every bit as before when taken off.

Quantised weights cannot take a merge, as it would be lost in rounding; there the layers compute with what their bits
stand for and the adapters over it.
"""

import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter, Delta, Network
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.ops.effect import fitting
from diffgraft.adapters.strengths import Strength, strengths_of
from diffgraft.adapters.words import AddedTokens
from diffgraft.bases import Base
from diffgraft.bases.ldm_keys import layers_in_block
from diffgraft.bases.pipelines import as_denoiser, predicted
from diffgraft.bases.prediction import PREDICTION_KEY, PREDICTIONS
from diffgraft.bases.quantized import Quantized
from diffgraft.bases.registry import part_names
from diffgraft.errors import DiffgraftError, did_you_mean

Grafts = Mapping[Any, Strength]
"""A file's path, a run or an `Adapter` → its strength or strengths. (`Mapping` is invariant in its key: `Any`.)"""

Words = Mapping[str, Mapping[str, Tensor]]
"""Word → text encoder → vectors [n, width]"""

_LAYERS: WeakKeyDictionary[nn.Module, list["Graft"]] = WeakKeyDictionary()
"""The grafts that lie on a module now, the newest last: only that one knows which weights to put back."""


def graft(target: Any, adapters: Grafts | str | PathLike[str] | Adapter | None = None) -> "Graft":
    """Merge `adapters` (a file's path or an `Adapter` → strength) into `target`, in the order given.

    Args:
        target: anything with `.unet`, `.text_encoder` and so on (a diffusers pipeline, a `Base`), or a bare
            denoiser. A part that no adapter touches may be absent or None.
        adapters: one file, run or `Adapter`, at strength 1, or several with theirs: 1 is what was trained, 0 is the
            bare base, and negative strengths subtract. A strength may be given for each part,
            ``{"text_encoder": 0.5, "M00": 0}``; a part that is not named then has 1, and a second text encoder what
            the first one has. Blocks of the UNet may have their own, by name, ``{"OUT05": 0}``, or as a list of 12, 17,
            20 or 26 numbers (see `diffgraft.adapters.strengths`). Words are there or not: unless their text encoders
            have 0, they have the vectors that were trained.

    Returns:
        A context manager that restores the very same bits on leaving; also `.set({...})` and `.remove()`.

    Raises:
        DiffgraftError: an adapter cannot be read, or was made for another base; the target is then as it was.
    """
    grafted = Graft(target)
    grafted.set({adapters: 1.0} if isinstance(adapters, str | PathLike | Adapter) else adapters or {})
    return grafted


class Graft:
    """What is merged into a target now, and the weights that it had before."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._parts = _parts(target)
        self._hash = target.hash if isinstance(target, Base) else None
        self._kept: dict[str, tuple[nn.Module, Tensor | None, Tensor | None]] = {}
        """Path → module, and the weight and bias it had; none of a quantised one, whose bits do not change"""
        self._over: list[Callable[[], None]] = []

    def set(self, adapters: Grafts) -> None:
        """Replace what is grafted by `adapters`."""
        if not isinstance(adapters, Mapping):
            raise DiffgraftError(f"{adapters!r} are no adapters with strengths: write {{FILE: 0.8, OTHER: 0.5}}.")
        merged: dict[str, tuple[nn.Module, list[tuple[Delta, float]]]] = {}
        networks: list[tuple[str, Network, float]] = []
        words: list[tuple[str, Words]] = []
        for source, value in adapters.items():
            adapter = source if isinstance(source, Adapter) else load_adapter(source, layers_in_block(self._target))
            name = f"The {adapter.method} adapter" if isinstance(source, Adapter) else str(Path(source))
            strengths = strengths_of(name, value)
            if idle := strengths.idle(adapter):
                warnings.warn(f"{name} changes nothing in {', '.join(idle)}: that strength does nothing.", stacklevel=4)
            modules = self._resolve(name, adapter)
            self._warn_of_another_base(name, adapter)
            for path, deltas in adapter.deltas.items():
                if strength := strengths.at(path):
                    merged.setdefault(path, (modules[path], []))[1].extend((delta, strength) for delta in deltas)
            of_networks = strengths.of_denoiser
            networks += [(name, network, of_networks) for network in adapter.networks if of_networks]
            if any(strengths.parts[part] for vectors in adapter.tokens.values() for part in vectors):
                words.append((name, adapter.tokens))
        words = _each_once(words)
        self.remove()
        try:
            for path, (module, steps) in merged.items():
                self._merge(path, module, steps)
            for name, tokens in words:
                try:
                    self._over.append(AddedTokens(self._target, tokens).remove)
                except DiffgraftError as error:
                    raise DiffgraftError(f"{name} cannot be used here. {error}") from error
            for name, network, strength in networks:
                try:
                    self._over.append(network.hook(self._parts, strength))
                except (ValueError, KeyError) as error:
                    raise DiffgraftError(f"{name} does not fit this base: {error}.") from error
        except BaseException:
            self.remove()
            raise

    @torch.no_grad()
    def _merge(self, path: str, module: nn.Module, deltas: Sequence[tuple[Delta, float]]) -> None:
        """Apply all deltas of one module in float32, and round to its precision once."""
        if isinstance(module, Quantized):  # it does so whenever it computes, so that its weight is never kept whole
            self._kept[path] = (module, None, None)
            _LAYERS.setdefault(module, []).append(self)
            there = [(_on(module.weight.device, delta), strength) for delta, strength in deltas]
            module.changes.append(partial(_applied, there))
            return
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        self._kept[path] = (module, weight.detach().clone(), None if bias is None else bias.detach().clone())
        _LAYERS.setdefault(module, []).append(self)
        new_weight, new_bias = _applied(
            deltas, weight.detach().float(), None if bias is None else bias.detach().float()
        )
        for now, kept in ((new_weight, weight), (new_bias, bias)):
            if now is not None and kept is not None and not now.to(kept.dtype).isfinite().all():
                raise DiffgraftError(
                    f"The adapters make {path} larger than {str(kept.dtype).removeprefix('torch.')} can hold, and "
                    "pictures would be black. Take smaller strengths, or look at the files with `diffgraft inspect`."
                )
        weight.copy_(new_weight)
        if bias is not None and new_bias is not None:
            bias.copy_(new_bias)

    @torch.no_grad()
    def remove(self) -> None:
        """Put back the weights the target had; doing it twice is no harm.

        Raises:
            DiffgraftError: another graft was laid over this one and is still there; nothing has changed then.
        """
        if any(_LAYERS[module][-1] is not self for module, _, _ in self._kept.values()):
            raise DiffgraftError("Another graft lies over this one: remove that one first.")
        while self._over:
            self._over[-1]()
            self._over.pop()
        for module, weight, bias in self._kept.values():
            _LAYERS[module].pop()
            if weight is None:
                assert isinstance(module, Quantized)
                module.changes.pop()
                continue
            module.get_parameter("weight").copy_(weight)
            if bias is not None:
                module.get_parameter("bias").copy_(bias)
        self._kept.clear()

    def _find(self, path: str) -> nn.Module | None:
        """The module at an adapter's path; some text encoders still have the level ``text_model``."""
        part, _, inside = path.partition(".")
        for name in (inside, f"text_model.{inside}"):
            try:
                return self._parts[part].get_submodule(name)
            except (KeyError, AttributeError):
                continue
        return None

    def _resolve(self, name: str, adapter: Adapter) -> dict[str, nn.Module]:
        """Module for each path of the adapter, or an error that tells what fits and what does not."""
        found, absent, misshapen = {}, [], []
        for path, deltas in adapter.deltas.items():
            module = self._find(path)
            weight = getattr(module, "weight", None)
            if module is None or not isinstance(weight, Tensor):
                absent.append(path)
                continue
            shape = (module.out_features, module.in_features) if isinstance(module, Quantized) else tuple(weight.shape)
            if not isinstance(module, Quantized) and (not weight.is_floating_point() or is_quantised(weight)):
                raise DiffgraftError(
                    f"{name} cannot be merged: {path} of this base is quantised, and rounding to its few values would "
                    "lose the adapter. Load the base in float16 or bfloat16, or by load_base(…, quantize=…)."
                )
            if all(delta.fits(shape) for delta in deltas):
                found[path] = module
            else:
                misshapen.append(f"{path} (here {' × '.join(map(str, shape))})")
        if not absent and not misshapen:
            return found
        made_for = adapter.metadata.get("base")
        family = made_for.get("family") if isinstance(made_for, Mapping) else ", ".join(fitting(adapter.deltas))
        hint = f" It was made for a base of the family {family}." if family else ""
        raise DiffgraftError(
            f"{name} does not fit this base: {len(found)} of its {len(adapter.deltas)} modules match.{hint}"
            + self._absent(absent, few=len(absent) <= len(found))
            + (f" {len(misshapen)} have another shape, such as {misshapen[0]}." if misshapen else "")
            + " Use the base the adapter was trained on."
        )

    def _absent(self, absent: list[str], few: bool) -> str:
        if not absent:
            return ""
        part = absent[0].partition(".")[0]
        here = self._parts.get(part)
        if here is None:
            return f" {len(absent)} are not there, such as {absent[0]}: this base has no {part}."
        last = absent[0].rpartition(".")[2]
        alike = [f"{part}.{path}" for path, _ in here.named_modules() if path.endswith("." + last)]
        hint = f" ({did_you_mean(absent[0], alike)})" if alike and few else ""
        return f" {len(absent)} are not there, such as {absent[0]}{hint}."

    def _warn_of_another_base(self, name: str, adapter: Adapter) -> None:
        made_for = adapter.metadata.get("base")
        if not isinstance(made_for, Mapping):
            return
        here, trained = predicted(self._target), made_for.get(PREDICTION_KEY)
        if here and trained in PREDICTIONS and here != trained:
            warnings.warn(
                f"{name} was trained on a base that predicts {trained}, and this one predicts {here}: if that is the "
                f"same base, its files do not say it; load it with {PREDICTION_KEY}={trained}.",
                stacklevel=5,
            )
        if self._hash and made_for.get("hash", self._hash) != self._hash:
            other = made_for.get("name", "another base")
            warnings.warn(
                f"{name} was trained on {other}, not on this base: it fits, but may not do the same.", stacklevel=5
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def is_quantised(weight: Tensor) -> bool:
    """Whether it is one of bitsandbytes' packed weights."""
    return hasattr(weight, "quant_state") or hasattr(weight, "CB")


def _applied(
    deltas: Sequence[tuple[Delta, float]], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float32 under all deltas, in order."""
    for delta, strength in deltas:
        weight, bias = delta.apply(weight, bias, strength)
    return weight, bias


def _on(device: torch.device, held: Any) -> Any:
    """A delta, as far as it is made of dataclasses, mappings and tensors, with its tensors on `device`."""
    if isinstance(held, Tensor):
        return held.to(device)
    if isinstance(held, Mapping):
        return {name: _on(device, value) for name, value in held.items()}
    if is_dataclass(held) and not isinstance(held, type):
        return replace(held, **{one.name: _on(device, getattr(held, one.name)) for one in fields(held) if one.init})
    return held


def _each_once(files: Sequence[tuple[str, Words]]) -> list[tuple[str, Words]]:
    """Words by the file that teaches them; a word that a file before has with the same vectors is taught once.

    Pivotal tuning leaves its word both beside its weights and in a file of its own.

    Raises:
        DiffgraftError: two files teach one word with different vectors.
    """
    first: dict[str, tuple[str, Mapping[str, Tensor]]] = {}
    found: list[tuple[str, Words]] = []
    for name, words in files:
        own = {}
        for word, vectors in words.items():
            key = unicodedata.normalize("NFC", word).casefold()  # prompts are read without capitals
            other, known = first.setdefault(key, (name, vectors))
            if (
                known is vectors or other == name
            ):  # of one file, words that differ in capitals alone are told apart later
                own[word] = vectors
            elif known.keys() != vectors.keys() or not all(_same(known[part], vectors[part]) for part in known):
                raise DiffgraftError(
                    f"{other} and {name} both teach the word {word!r}, with different vectors: leave one of them out, "
                    "as a prompt can mean one of them only."
                )
        if own:
            found.append((name, own))
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.float().cpu(), other.float().cpu())


def _parts(target: Any) -> dict[str, nn.Module]:
    parts = {name: getattr(target, name, None) for name in part_names()}
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if not found and isinstance(target, nn.Module):
        found = as_denoiser(target)
    if not found:
        raise DiffgraftError(
            f"A {type(target).__name__} holds nothing to graft onto: give a diffusers pipeline, a base, or a UNet."
        )
    return found
