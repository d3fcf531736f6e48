"""Adapters on a live pipeline: merged into its weights, and removed again so that every bit is as before.

Adapters cannot be merged into quantized weights, as rounding would lose them. Quantized layers dequantize their weight
and apply the adapters to it whenever they compute. T-LoRAs are not merged either, as they depend on the timestep.
"""

import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.ops.effect import fitting_bases
from diffgraft.adapters.strengths import Strength, strengths_of
from diffgraft.adapters.words import AddedTokens
from diffgraft.bases import Base
from diffgraft.bases.layers import is_of_text
from diffgraft.bases.ldm_keys import layers_per_block_of
from diffgraft.bases.pipelines import as_denoiser, prediction_of
from diffgraft.bases.prediction import PREDICTION_KEY, PREDICTIONS
from diffgraft.bases.quantized import Quantized
from diffgraft.bases.registry import part_names
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.generation.beside import lay_beside, thin_factors
from diffgraft.generation.by_timestep import TimedLoras, by_timestep

AdapterStrengths = Mapping[Any, Strength]
"""File, folder of a run, or `Adapter` → strength, or strengths by part or block (keys of `Mapping` are invariant)"""

_SURELY_FINITE = 1e30
"""Bound on the entries of ΔW below which no weight in float32 overflows"""
ModuleDeltas = list[tuple[Delta, float]]
"""Deltas of one module in the order in which they are applied, with their strengths"""
WordVectors = Mapping[str, Mapping[str, Tensor]]
"""Word → name of a text encoder → embedding vectors [n, width]"""

_GRAFTS: WeakKeyDictionary[nn.Module, list["Graft"]] = WeakKeyDictionary()
"""Module → grafts on it now, the newest last; only the newest may restore the module's weights"""


def graft(target: Any, adapters: AdapterStrengths | str | PathLike[str] | Adapter | None = None) -> "Graft":
    """Apply adapters to a live pipeline by merging them into its weights, in the order given.

    Args:
        target: a diffusers pipeline, a `Base` or any object with `.unet`, `.text_encoder` and so on, or a bare
            denoiser. Parts that no adapter changes may be missing or None.
        adapters: one file, run or `Adapter`, which gets strength 1, or a mapping of several to their strengths.
            Strength 1 is the adapter as trained, 0 turns it off, and negative strengths subtract it. A strength may be
            a mapping of parts and blocks, ``{"text_encoder": 0.5, "M00": 0}``: parts that it does not name have
            strength 1, and a second text encoder has that of the first. Blocks of the UNet may also be given as a list
            of 12, 17, 20 or 26 numbers (see `diffgraft.adapters.strengths`). Strengths do not scale the vectors of
            words: a word is used as trained, or not at all if all its text encoders have strength 0.

    Returns:
        A `Graft`: a context manager that restores the weights bit for bit at its end; its `set` replaces the adapters,
        and its `remove` restores the weights at once.

    Raises:
        DiffgraftError: an adapter cannot be read, or does not fit this base; `target` is then unchanged.
    """
    applied = Graft(target)
    applied.set({adapters: 1.0} if isinstance(adapters, str | PathLike | Adapter) else adapters or {})
    return applied


class Graft:
    """The adapters that are applied to a target, and the weights it had before."""

    def __init__(self, target: Any, *, beside: bool = False) -> None:
        """Prepare a target, without adapters.

        Args:
            target: as in `graft`.
            beside: whether LoRAs lie beside large layers of a processor instead of being merged: they change at once,
                and cost up to 7 % of its time. Outputs are the same but for the last bits.
        """
        self._target, self._beside = target, beside
        self._parts = _parts(target)
        self._hash = target.hash if isinstance(target, Base) else None
        self._saved: dict[str, tuple[nn.Module, Tensor | None, Tensor | None]] = {}
        """Module path → module, and its original weight and bias; None for quantized modules, whose weight stays"""
        self._merged: dict[str, ModuleDeltas] = {}
        """Module path → what is merged into it now, or lies beside it"""
        self._beside_layers: dict[str, tuple[nn.Module, Callable[[], None]]] = {}
        """Module path → module, and a function that removes the LoRAs beside it"""
        self._timed = TimedLoras(self._parts)
        """T-LoRAs, which are added to the outputs of layers"""
        self._timed_layers: dict[str, nn.Module] = {}
        """Module path → module with T-LoRAs"""
        self._extras: list[tuple[object, float]] = []
        """Words and networks that are applied now, with their strengths"""
        self._undo: list[Callable[[], None]] = []
        """Functions that remove words and networks, in the order in which they were added"""

    def set(self, adapters: AdapterStrengths) -> None:
        """Replace all adapters of this graft by `adapters`; modules whose deltas and strengths stay are left alone.

        Raises:
            DiffgraftError: an adapter cannot be read, or does not fit this base.
        """
        if not isinstance(adapters, Mapping):
            raise DiffgraftError(
                f"Invalid adapters {adapters!r}: must be a mapping of files to strengths, such as {{FILE: 0.8}}."
            )
        modules: dict[str, nn.Module] = {}
        merged: dict[str, ModuleDeltas] = {}
        networks: list[tuple[str, Network, float]] = []
        words: list[tuple[str, WordVectors]] = []
        for source, value in adapters.items():
            adapter = source if isinstance(source, Adapter) else load_adapter(source, layers_per_block_of(self._target))
            name = f"The {adapter.method} adapter" if isinstance(source, Adapter) else str(Path(source))
            strengths = strengths_of(name, value)
            if unused := strengths.unused_blocks(adapter):
                warnings.warn(
                    f"{name} does not change {', '.join(unused)}: its strength there has no effect.", stacklevel=4
                )
            modules |= self._resolve(name, adapter)
            self._warn_of_another_base(name, adapter)
            for path, deltas in adapter.deltas.items():
                if strength := strengths.at(path):
                    merged.setdefault(path, []).extend((delta, strength) for delta in deltas)
            for network in adapter.networks:
                if strength := strengths.for_network(network):
                    networks.append((name, network, strength))
            if any(strengths.parts[part] for vectors in adapter.tokens.values() for part in vectors):
                words.append((name, adapter.tokens))
        _check_in_place([network for _, network, _ in networks], merged)
        words = _without_duplicate_words(words)
        before = self._merged
        changed = [path for path in {**before, **merged} if not _is_same(merged.get(path), before.get(path))]
        self._check_newest(changed)
        try:
            self._set_extras(words, networks)
            for path in changed:
                if path in merged:
                    self._apply(path, modules[path], merged[path])
                else:
                    self._restore(path)
        except BaseException:
            self.remove()
            raise
        self._merged = merged

    def check(self, adapter: Adapter, name: str) -> None:
        """Check that an adapter fits the target, which may be on the device ``meta``; nothing is applied.

        Raises:
            DiffgraftError: it does not fit; the message begins with `name`.
        """
        self._resolve(name, adapter)

    def _set_extras(
        self, words: Sequence[tuple[str, WordVectors]], networks: Sequence[tuple[str, Network, float]]
    ) -> None:
        """Replace words and networks, unless they stay the same."""
        extras: list[tuple[object, float]] = [(vectors, 1.0) for _, tokens in words for vectors in tokens.values()]
        extras += [(network, strength) for _, network, strength in networks]
        if _is_same(extras, self._extras):
            return
        self._remove_extras()
        for name, tokens in words:
            try:
                self._undo.append(AddedTokens(self._target, tokens).remove)
            except DiffgraftError as error:
                raise DiffgraftError(f"{name} cannot be used here. {error}") from error
        for name, network, strength in networks:
            try:
                self._undo.append(network.hook(self._parts, strength))
            except (ValueError, KeyError) as error:
                raise DiffgraftError(f"{name} does not fit this base: {error}.") from error
        self._extras = extras

    def _remove_extras(self) -> None:
        self._extras = []
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def _apply(self, path: str, module: nn.Module, deltas: ModuleDeltas) -> None:
        """Merge the deltas of one module, and add those by timestep to its outputs."""
        self._remove_timed(path)
        timed = [item for item in deltas if by_timestep(item[0])]
        if plain := [item for item in deltas if not by_timestep(item[0])]:
            self._merge(path, module, plain)
        else:
            self._restore(path)
        if timed:
            self._timed.add(path, module, timed)
            self._timed_layers[path] = module
            _GRAFTS.setdefault(module, []).append(self)

    def _remove_timed(self, path: str) -> None:
        if path in self._timed_layers:
            self._timed.remove(path)
            grafts = _GRAFTS[self._timed_layers.pop(path)]
            del grafts[len(grafts) - 1 - grafts[::-1].index(self)]  # it may be there twice

    @torch.no_grad()
    def _merge(self, path: str, module: nn.Module, deltas: ModuleDeltas) -> None:
        """Apply all deltas of one module to its original weight in float32, then round to its dtype once."""
        if self._beside and (factors := thin_factors(module, deltas)) is not None:
            self._restore(path)
            self._beside_layers[path] = (module, lay_beside(module, *factors))
            _GRAFTS.setdefault(module, []).append(self)
            return
        if path in self._beside_layers:
            self._restore(path)
        if isinstance(module, Quantized):  # it applies them whenever it computes, so that no whole weight is held
            if path in self._saved:
                self._restore(path)
            self._saved[path] = (module, None, None)
            _GRAFTS.setdefault(module, []).append(self)
            on_device = [(_to_device(module.weight.device, delta), strength) for delta, strength in deltas]
            module.changes.append(partial(_apply_all, on_device))
            return
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        if path not in self._saved:
            self._saved[path] = (module, weight.detach().clone(), None if bias is None else bias.detach().clone())
            _GRAFTS.setdefault(module, []).append(self)
        _, original, original_bias = self._saved[path]
        assert original is not None
        if _add_low_rank(weight, original, deltas):
            if bias is not None and original_bias is not None:
                bias.copy_(original_bias)
            return
        new_weight, new_bias = _apply_all(
            deltas, original.float(), None if original_bias is None else original_bias.float()
        )
        for new, old in ((new_weight, weight), (new_bias, bias)):
            if new is not None and old is not None and not _is_finite(new.to(old.dtype)):
                raise DiffgraftError(
                    f"With these adapters {path} overflows {str(old.dtype).removeprefix('torch.')}, and pictures would "
                    "be black. Use smaller strengths, or check the files with `diffgraft inspect`."
                )
        weight.copy_(new_weight)
        if bias is not None and new_bias is not None:
            bias.copy_(new_bias)

    @torch.no_grad()
    def _restore(self, path: str) -> None:
        """Put back the original weight of one module, and remove what lies beside it."""
        self._remove_timed(path)
        if path in self._beside_layers:
            module, remove = self._beside_layers.pop(path)
            _GRAFTS[module].remove(self)
            remove()
        if path not in self._saved:
            return
        module, weight, bias = self._saved.pop(path)
        _GRAFTS[module].pop()
        if weight is None:
            assert isinstance(module, Quantized)
            module.changes.pop()
            return
        module.get_parameter("weight").copy_(weight)
        if bias is not None:
            module.get_parameter("bias").copy_(bias)

    def _check_newest(self, paths: Iterable[str]) -> None:
        """Raise DiffgraftError if a newer graft changes one of the modules at `paths`."""
        if any(path in self._saved and _GRAFTS[self._saved[path][0]][-1] is not self for path in paths):
            raise DiffgraftError("Adapters that were applied later change the same modules: remove those first.")

    def remove(self) -> None:
        """Restore the target's original weights; calling it again does nothing.

        Raises:
            DiffgraftError: a newer graft changes the same modules and must be removed first; nothing has changed.
        """
        self._check_newest(self._saved)
        self._remove_extras()
        for path in [*self._saved, *self._beside_layers, *self._timed_layers]:
            self._restore(path)
        self._merged = {}

    def _resolve(self, name: str, adapter: Adapter) -> dict[str, nn.Module]:
        """Return the module for each path of the adapter.

        Raises:
            DiffgraftError: a module is missing or of another shape; the message says how many match.
        """
        found, missing, misshapen = {}, [], []
        for path, deltas in adapter.deltas.items():
            module = find_module(self._parts, path)
            weight = getattr(module, "weight", None)
            if module is None or not isinstance(weight, Tensor):
                missing.append(path)
                continue
            shape = (module.out_features, module.in_features) if isinstance(module, Quantized) else tuple(weight.shape)
            if not isinstance(module, Quantized) and (not weight.is_floating_point() or is_quantised(weight)):
                raise DiffgraftError(
                    f"{name} cannot be merged: {path} of this base is quantized, and rounding would lose the adapter. "
                    "Load the base in float16 or bfloat16, or by load_base(…, quantize=…)."
                )
            if all(delta.fits(shape) for delta in deltas):
                found[path] = module
            else:
                misshapen.append(f"{path} (here {' × '.join(map(str, shape))})")
        if not missing and not misshapen:
            return found
        made_for = adapter.metadata.get("base")
        family = made_for.get("family") if isinstance(made_for, Mapping) else ", ".join(fitting_bases(adapter.deltas))
        hint = f" It was made for a base of the family {family}." if family else ""
        raise DiffgraftError(
            f"{name} does not fit this base: {len(found)} of its {len(adapter.deltas)} modules match.{hint}"
            + self._missing(missing, few=len(missing) <= len(found))
            + (f" {len(misshapen)} have another shape, such as {misshapen[0]}." if misshapen else "")
            + " Use the base the adapter was trained on."
        )

    def _missing(self, missing: list[str], few: bool) -> str:
        """Return a sentence on modules that the base does not have; if they are `few`, it suggests a similar path."""
        if not missing:
            return ""
        part = missing[0].partition(".")[0]
        root = self._parts.get(part)
        if root is None:
            return f" {len(missing)} are missing in this base, such as {missing[0]}: it has no {part}."
        last = missing[0].rpartition(".")[2]
        similar = [f"{part}.{path}" for path, _ in root.named_modules() if path.endswith("." + last)]
        hint = f" ({did_you_mean(missing[0], similar)})" if similar and few else ""
        return f" {len(missing)} are missing in this base, such as {missing[0]}{hint}."

    def _warn_of_another_base(self, name: str, adapter: Adapter) -> None:
        made_for = adapter.metadata.get("base")
        if not isinstance(made_for, Mapping):
            return
        own, trained = prediction_of(self._target), made_for.get(PREDICTION_KEY)
        if own and trained in PREDICTIONS and own != trained:
            warnings.warn(
                f"{name} was trained on a base that predicts {trained}, but this one predicts {own}. If it is the same "
                f"base and its files lack this setting, load it with {PREDICTION_KEY}={trained}.",
                stacklevel=5,
            )
        if self._hash and made_for.get("hash", self._hash) != self._hash:
            other = made_for.get("name", "another base")
            warnings.warn(
                f"{name} was trained on {other}, not on this base: it fits, but its effect may differ.", stacklevel=5
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def find_module(parts: Mapping[str, nn.Module], path: str) -> nn.Module | None:
    """Return the module at an adapter's path, or None; some text encoders still have the level ``text_model``."""
    part, _, inside = path.partition(".")
    for name in (inside, f"text_model.{inside}"):
        try:
            return parts[part].get_submodule(name)
        except (KeyError, AttributeError):
            continue
    return None


def has_other_grafts(target: Any, own: Graft) -> bool:
    """Whether modules of a target have adapters of another graft than `own` now."""
    parts = _parts(target).values()
    return any(other is not own for part in parts for module in part.modules() for other in _GRAFTS.get(module, ()))


def is_quantised(weight: Tensor) -> bool:
    """Whether `weight` is a packed weight of bitsandbytes."""
    return hasattr(weight, "quant_state") or hasattr(weight, "CB")


def _apply_all(
    deltas: Sequence[tuple[Delta, float]], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Apply deltas with their strengths in order, and return the new weight and bias in float32."""
    for delta, strength in deltas:
        weight, bias = delta.apply(weight, bias, strength)
    return weight, bias


def _add_low_rank(weight: Tensor, original: Tensor, deltas: ModuleDeltas) -> bool:
    """Write the original weight plus LoRAs into a float32 weight, without memory for ΔW; False if that is not possible.

    The result has the bits of `_apply_all`, which adds one after the other as well.
    """
    if weight.dtype != torch.float32 or not weight.is_contiguous() or not original.is_contiguous():
        return False
    factors = [delta.low_rank_factors(strength) for delta, strength in deltas if isinstance(delta, FactorDelta)]
    if len(factors) != len(deltas) or not all(delta.is_lora for delta, _ in deltas):
        return False
    start, target = original.flatten(1), weight.flatten(1)
    for pair in factors:
        assert pair is not None
        up, down = (factor.to(weight.device) for factor in pair)
        if not float(up.abs().max()) * float(down.abs().max()) * len(down) < _SURELY_FINITE:
            return False
        torch.addmm(start, up, down, out=target)
        start = target
    return True


def _is_finite(values: Tensor) -> bool:
    """Whether all values are finite; their sum tells it in half the time, unless that alone overflows."""
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def _check_in_place(networks: Sequence[Network], merged: Mapping[str, ModuleDeltas]) -> None:
    """Raise DiffgraftError if a network takes the denoiser's place, and something else changes the denoiser."""
    if not any(network.replaces_denoiser for network in networks):
        return
    changed = [path for path in merged if not is_of_text(path)]
    if changed or len(networks) > 1:
        raise DiffgraftError(
            "A student takes the place of the denoiser, so that the other adapters on the denoiser would have no "
            "effect: write the student as a base with `diffgraft merge`, and give the others on that base."
        )


def _is_same(new: Sequence[tuple[object, float]] | None, old: Sequence[tuple[object, float]] | None) -> bool:
    """Whether two lists hold the very same objects at the same strengths, in the same order."""
    if new is None or old is None or len(new) != len(old):
        return new is old
    return all(a is b and strength == other for (a, strength), (b, other) in zip(new, old, strict=True))


def _to_device(device: torch.device, value: Any) -> Any:
    """Return a delta, or a part of one, with its tensors on `device`; dataclasses and mappings are traversed."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _to_device(device, item) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        moved = {field.name: _to_device(device, getattr(value, field.name)) for field in fields(value) if field.init}
        return replace(value, **moved)
    return value


def _without_duplicate_words(files: Sequence[tuple[str, WordVectors]]) -> list[tuple[str, WordVectors]]:
    """Return the words of each file, without words that an earlier file has with the same vectors.

    Pivotal tuning writes its word both beside its weights and into a file of its own.

    Raises:
        DiffgraftError: two files have the same word with different vectors.
    """
    first: dict[str, tuple[str, Mapping[str, Tensor]]] = {}
    unique: list[tuple[str, WordVectors]] = []
    for name, words in files:
        new = {}
        for word, vectors in words.items():
            key = unicodedata.normalize("NFC", word).casefold()  # prompts are read in lower case
            other, known = first.setdefault(key, (name, vectors))
            if known is vectors or other == name:  # words of one file may differ in case only; `AddedTokens` handles it
                new[word] = vectors
            elif known.keys() != vectors.keys() or not all(_equal(known[part], vectors[part]) for part in known):
                raise DiffgraftError(
                    f"{other} and {name} both have the word {word!r}, with different vectors: leave one of them out."
                )
        if new:
            unique.append((name, new))
    return unique


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float().cpu(), b.float().cpu())


def _parts(target: Any) -> dict[str, nn.Module]:
    """Return the parts of a pipeline or base that adapters may change, by name; a bare denoiser is one part."""
    candidates = {name: getattr(target, name, None) for name in part_names()}
    parts = {name: part for name, part in candidates.items() if isinstance(part, nn.Module)}
    if not parts and isinstance(target, nn.Module):
        parts = as_denoiser(target)
    if not parts:
        raise DiffgraftError(
            f"A {type(target).__name__} has no part to apply adapters to: give a diffusers pipeline, a base, or a UNet."
        )
    return parts
