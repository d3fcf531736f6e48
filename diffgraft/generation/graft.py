"""Adapters on a live pipeline: merged into its weights while wanted, and every bit as before when taken off."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.errors import DiffgraftError, nearest

Strengths = Mapping[Any, float]
"""A file's path or an `Adapter` → strength. (`Mapping` is invariant in its key, hence `Any`.)"""
PARTS = ("unet", "text_encoder", "text_encoder_2")


def graft(target: Any, adapters: Strengths | None = None) -> "Graft":
    """Merge `adapters` (a file's path or an `Adapter` → strength) into `target`, in the order given.

    Args:
        target: anything with `.unet`, `.text_encoder`, `.text_encoder_2` (a diffusers pipeline, a `Base`), or a bare
            UNet. A part that no adapter touches may be absent or None.
        adapters: strength 1 is what was trained, 0 is the bare base, and negative strengths subtract.

    Returns:
        A context manager that restores the very same bits on leaving; also `.set({...})` and `.remove()`.

    Raises:
        DiffgraftError: an adapter cannot be read, or was made for another base; the target is then as it was.
    """
    grafted = Graft(target)
    grafted.set(adapters or {})
    return grafted


class Graft:
    """What is merged into a target now, and the weights that it had before."""

    def __init__(self, target: Any) -> None:
        self._parts = _parts(target)
        self._kept: dict[str, Tensor] = {}

    def set(self, adapters: Strengths) -> None:
        """Replace what is grafted by `adapters`."""
        loaded = []
        for source, strength in adapters.items():
            adapter = source if isinstance(source, Adapter) else load_adapter(source)
            name = f"adapter {adapter.method}" if isinstance(source, Adapter) else str(source)
            if isinstance(strength, bool) or not isinstance(strength, int | float) or strength != strength:
                raise DiffgraftError(f"The strength of {name} is {strength!r}, which is no number. Use 0 to 1, or so.")
            loaded.append((name, adapter, float(strength)))
        modules = {name: self._resolve(name, adapter) for name, adapter, _ in loaded}
        self.remove()
        with torch.no_grad():
            for name, adapter, strength in loaded:
                if strength == 0:
                    continue
                for path, deltas in adapter.deltas.items():
                    self._merge(path, modules[name][path], deltas, strength)

    def _merge(self, path: str, module: nn.Module, deltas: tuple[Any, ...], strength: float) -> None:
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and f"{path}.{name}" not in self._kept:
                self._kept[f"{path}.{name}"] = value.detach().clone()
        new_weight: Tensor = weight.detach()
        new_bias: Tensor | None = None if bias is None else bias.detach()
        for delta in deltas:
            new_weight, new_bias = delta.apply(new_weight, new_bias, strength)
        weight.copy_(new_weight)
        if bias is not None and new_bias is not None:
            bias.copy_(new_bias)

    def remove(self) -> None:
        """Put back the weights the target had; doing it twice is no harm."""
        with torch.no_grad():
            for path, value in self._kept.items():
                part, _, inside = path.partition(".")
                self._parts[part].get_parameter(inside).copy_(value)
        self._kept.clear()

    def _resolve(self, name: str, adapter: Adapter) -> dict[str, nn.Module]:
        """Module for each path of the adapter, or an error that tells what fits and what does not."""
        found, absent, misshapen = {}, [], []
        for path, deltas in adapter.deltas.items():
            part, _, inside = path.partition(".")
            try:
                module = self._parts[part].get_submodule(inside)
                shape = tuple(module.get_parameter("weight").shape)
            except (KeyError, AttributeError):
                absent.append(path)
                continue
            if all(delta.fits(shape) for delta in deltas):
                found[path] = module
            else:
                misshapen.append(f"{path} (here {' × '.join(map(str, shape))})")
        if not absent and not misshapen:
            return found
        made_for = adapter.metadata.get("base") or {}
        family = made_for.get("family") if isinstance(made_for, Mapping) else None
        hint = f" It was made for a base of the family {family}." if family else ""
        raise DiffgraftError(
            f"{name} does not fit this base: {len(found)} of its {len(adapter.deltas)} modules match.{hint}"
            + self._absent(absent)
            + (f" {len(misshapen)} have another shape, such as {misshapen[0]}." if misshapen else "")
            + " Use the base the adapter was trained on."
        )

    def _absent(self, absent: list[str]) -> str:
        if not absent:
            return ""
        here = [f"{part}.{path}" for part, module in self._parts.items() for path, _ in module.named_modules() if path]
        return f" {len(absent)} are not there, such as {absent[0]} ({nearest(absent[0], here[:4000])[:160]})."

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _parts(target: Any) -> dict[str, nn.Module]:
    parts = {name: getattr(target, name, None) for name in PARTS}
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if not found and isinstance(target, nn.Module):
        found = {"unet": target}
    if not found:
        raise DiffgraftError(
            f"A {type(target).__name__} holds nothing to graft onto: give a diffusers pipeline, a base, or a UNet."
        )
    return found
