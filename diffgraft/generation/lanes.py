"""Adapters of single rows of a batch: pictures, or regions of one, that share a forward pass with other adapters.

Each set of adapters is a lane. The layers' outputs get what the lane of each row adds, on top of what is merged:
products of thin matrices for all rows at once where the change is of low rank; else its rows are computed again with
its own weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from diffgraft.adapters.adapter import Adapter, Delta, LinearDelta
from diffgraft.adapters.rank_schedule import TimestepReader
from diffgraft.adapters.strengths import Strength, strengths_of
from diffgraft.bases.quantized import Quantized
from diffgraft.errors import DiffgraftError
from diffgraft.generation.beside import whole_weight
from diffgraft.generation.by_timestep import by_timestep, last_timesteps
from diffgraft.generation.graft import find_module

LaneAdapters = Sequence[tuple[Adapter, Strength]]
"""Adapters of one lane, with their strengths, in the order in which they are applied"""
_Weighed = list[tuple[Delta, float]]


class LaneError(DiffgraftError):
    """An adapter cannot differ between the rows of a batch."""


@dataclass(frozen=True, eq=False)
class _Thin:
    """What all lanes add to a layer, as products of thin matrices; the last lane is zero."""

    down: Tensor
    """[lanes + 1, r, in · height · width]"""
    up: Tensor
    """[lanes + 1, out, r]"""
    last: Tensor
    """Last timestep of each rank, [lanes + 1, r]; infinite for ranks that always act"""

    @property
    def is_timed(self) -> bool:
        """Whether some ranks depend on the timestep."""
        return bool(self.last.isfinite().any())

    def at(self, lanes: Sequence[int], dtype: torch.dtype) -> "_Thin":
        """Return the factors of some lanes, as many as are named; -1 names the last one."""
        index = torch.tensor(lanes, device=self.down.device) % len(self.down)
        return _Thin(self.down[index].to(dtype), self.up[index].to(dtype), self.last[index])


@dataclass(frozen=True)
class _Whole:
    """The weights of a layer with each lane's adapters."""

    parameters: Mapping[int, Mapping[str, nn.Parameter]]
    """Lane → name → value"""


class Lanes:
    """Hooks of a denoiser that add each row's adapters; `rows` tells the lane of each row before each forward pass."""

    def __init__(self, denoiser_name: str, denoiser: nn.Module) -> None:
        """Prepare lanes without adapters.

        Args:
            denoiser_name: name of the denoiser in adapter paths.
            denoiser: the denoiser; adapters that are merged into it stay.
        """
        self.rows: Sequence[int] = ()
        """Lane of each row of the batch, -1 for none"""
        self._name, self._denoiser = denoiser_name, denoiser
        self._count = 0
        self._hooks: list[Any] = []
        self._of_rows: dict[_Thin, tuple[tuple[int, ...], _Thin]] = {}
        """Factors of a layer → the rows of the last forward pass, and the factors of each row"""
        self._timesteps: TimestepReader | None = None
        """Reads the timesteps of forward passes, if ranks of some adapters depend on them (T-LoRA)"""

    def set(self, lanes: Sequence[LaneAdapters]) -> None:
        """Replace the adapters of all lanes.

        Raises:
            LaneError: an adapter has a part that cannot differ between rows; there are then none.
        """
        self.remove()
        self._count = len(lanes)
        changes: list[tuple[nn.Module, _Thin | _Whole]] = []
        by_path: dict[str, dict[int, _Weighed]] = {}
        for lane, adapters in enumerate(lanes):
            for adapter, strength in adapters:
                values = strengths_of(f"the {adapter.method} adapter", strength)
                if adapter.networks and values.denoiser:
                    raise LaneError(f"The {adapter.method} adapter cannot act on a part of a batch or a picture.")
                for path, deltas in adapter.deltas.items():
                    if path.startswith(f"{self._name}.") and (value := values.at(path)):
                        by_path.setdefault(path, {}).setdefault(lane, []).extend((delta, value) for delta in deltas)
        for path, of_lanes in by_path.items():
            layer = find_module({self._name: self._denoiser}, path)
            if layer is None:
                raise LaneError(f"This base has no {path}.")
            changes.append((layer, self._thin(layer, of_lanes) or _whole(layer, path, of_lanes)))
        if any(isinstance(change, _Thin) and change.is_timed for _, change in changes):
            self._timesteps = TimestepReader(self._denoiser)
        for layer, change in changes:
            hook = self._add_thin if isinstance(change, _Thin) else self._replace
            self._hooks.append(layer.register_forward_hook(_bound(hook, change)))

    def remove(self) -> None:
        """Remove all adapters."""
        self._of_rows.clear()
        while self._hooks:
            self._hooks.pop().remove()
        if self._timesteps is not None:
            self._timesteps.remove()
            self._timesteps = None

    def _thin(self, layer: nn.Module, of_lanes: Mapping[int, _Weighed]) -> _Thin | None:
        """Return the factors of all lanes, zero where a lane has fewer; None if a change is not of low rank."""
        is_conv = isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and layer.groups == 1
        if not is_conv and not isinstance(layer, nn.Linear | Quantized):
            return None
        factors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for lane, deltas in of_lanes.items():
            pairs = [
                delta.low_rank_factors(strength) if isinstance(delta, LinearDelta) else None
                for delta, strength in deltas
            ]
            known = [pair for pair in pairs if pair is not None]
            if len(known) < len(pairs):
                return None
            factors[lane] = (
                torch.cat([up for up, _ in known], 1),
                torch.cat([down for _, down in known]),
                torch.cat(
                    [last_timesteps(delta, len(own)) for (delta, _), (_, own) in zip(deltas, known, strict=True)]
                ),
            )
        rank = max(len(down) for _, down, _ in factors.values())
        up, down, _ = next(iter(factors.values()))
        weight: Any = layer.weight
        device = weight.device
        downs = torch.zeros(self._count + 1, rank, down.shape[1], device=device)
        ups = torch.zeros(self._count + 1, len(up), rank, device=device)
        lasts = torch.full((self._count + 1, rank), torch.inf, device=device)
        for lane, (own_up, own_down, last) in factors.items():
            downs[lane, : len(own_down)], ups[lane, :, : own_up.shape[1]] = own_down, own_up
            lasts[lane, : len(last)] = last
        return _Thin(downs, ups, lasts)

    def _add_thin(self, change: _Thin, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        factors = self._at_rows(change, x.dtype)
        down, up = factors.down, factors.up
        if self._timesteps is not None and (mask := self._timesteps.mask(factors.last)) is not None:
            down = down * mask.unsqueeze(-1).to(down.dtype)
        if isinstance(layer, nn.Conv2d):
            count, channels, height, width = x.shape
            kernel = down.view(-1, channels, *layer.kernel_size)
            small = conv2d(
                x.reshape(1, count * channels, height, width), kernel, None, layer.stride, layer.padding,
                layer.dilation, count,
            )  # fmt: skip
            return torch.baddbmm(out.flatten(2), up, small.view(count, down.shape[1], -1)).view_as(out)
        flat = x.reshape(len(x), -1, x.shape[-1])
        return torch.baddbmm(out.reshape(len(out), -1, out.shape[-1]), flat @ down.mT, up.mT).view_as(out)

    def _at_rows(self, change: _Thin, dtype: torch.dtype) -> _Thin:
        """Return the factors of each row; they are kept, as the rows stay the same through most of the passes."""
        rows = tuple(self.rows)
        kept, factors = self._of_rows.get(change, ((), change))
        if kept != rows or factors.down.dtype != dtype:
            factors = change.at(rows, dtype)
            self._of_rows[change] = rows, factors
        return factors

    def _replace(self, change: _Whole, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Compute the rows of each lane again with its weights."""
        out = out.clone()
        held = dict(layer._parameters)
        for lane, parameters in change.parameters.items():
            if rows := [place for place, own in enumerate(self.rows) if own == lane]:
                try:
                    layer._parameters.update(parameters)
                    out[rows] = layer.forward(x[rows])  # without hooks
                finally:
                    layer._parameters.update(held)
        return out


def _bound(hook: Callable[..., Tensor], change: _Thin | _Whole) -> Callable[..., Tensor]:
    def after(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return hook(change, layer, args[0], out)

    return after


def _whole(layer: nn.Module, path: str, of_lanes: Mapping[int, _Weighed]) -> _Whole:
    """Return the weights of each lane, on top of what is merged now."""
    if any(by_timestep(delta) for deltas in of_lanes.values() for delta, _ in deltas):
        raise LaneError(f"{path} has a T-LoRA and a change that is not of low rank: these cannot act on single rows.")
    if isinstance(layer, Quantized):
        raise LaneError(f"{path} is quantized, and a change that is not of low rank cannot act on a part of a batch.")
    dtype, bias = layer.get_parameter("weight").dtype, getattr(layer, "bias", None)
    parameters = {}
    for lane, deltas in of_lanes.items():
        new, new_bias = whole_weight(layer), None if bias is None else bias.detach().float()
        for delta, strength in deltas:
            new, new_bias = delta.apply(new, new_bias, strength)
        parameters[lane] = {"weight": nn.Parameter(new.to(dtype), requires_grad=False)}
        if bias is not None and new_bias is not None:
            parameters[lane]["bias"] = nn.Parameter(new_bias.to(dtype), requires_grad=False)
    return _Whole(parameters)
