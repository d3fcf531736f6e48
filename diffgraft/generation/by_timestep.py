"""LoRAs whose ranks depend on the timestep (T-LoRA), on the layers of live networks: they cannot be merged.

As in the authors' pipeline, drawing uses the ranks that training used at the same timestep. What they add to a layer's
output comes after all that is merged into its weight.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.adapters.adapter import Delta
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.patch import weight_shape
from diffgraft.adapters.rank_schedule import TimestepReader, masked_product


class TimedLoras:
    """The T-LoRAs of one graft, by module path."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        """Prepare the networks of a base, by name, without adapters."""
        self._parts = parts
        self._readers: dict[str, TimestepReader] = {}
        self._hooks: dict[str, Any] = {}

    def add(self, path: str, layer: nn.Module, deltas: Sequence[tuple[Delta, float]]) -> None:
        """Add T-LoRAs with their strengths to the outputs of the layer at `path`, which has none yet."""
        part = path.partition(".")[0]
        if part not in self._readers:
            self._readers[part] = TimestepReader(self._parts[part])
        self._hooks[path] = layer.register_forward_hook(_after(deltas, self._readers[part]))

    def remove(self, path: str) -> None:
        """Remove the T-LoRAs of the layer at `path`."""
        self._hooks.pop(path).remove()
        part = path.partition(".")[0]
        if not any(other.startswith(f"{part}.") for other in self._hooks):
            self._readers.pop(part).remove()


def by_timestep(delta: Delta) -> bool:
    """Whether the ranks of a delta that act depend on the timestep."""
    return delta.rank_schedule is not None


def last_timesteps(delta: Delta, rank: int) -> Tensor:
    """Return the last timestep at which each of a delta's ranks acts: [rank], float32, infinite where all always do."""
    schedule = delta.rank_schedule
    return torch.full((rank,), torch.inf) if schedule is None else schedule.last_timesteps(rank).float()


def _after(
    deltas: Sequence[tuple[Delta, float]], reader: TimestepReader
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a forward hook that adds T-LoRAs to a layer's output."""
    ups, downs, lasts = [], [], []
    for delta, strength in deltas:
        assert isinstance(delta, FactorDelta)
        factors = delta.low_rank_factors(strength)
        assert factors is not None
        ups.append(factors[0])
        downs.append(factors[1])
        lasts.append(last_timesteps(delta, delta.rank))
    up, down, last = torch.cat(ups, 1), torch.cat(downs), torch.cat(lasts)

    def hook(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        _, *inside = weight_shape(layer)
        ones = [1] * (len(inside) - 1)
        own_down, own_up = down.to(args[0]).view(-1, *inside), up.to(args[0]).view(*up.shape, *ones)
        added = masked_product(layer, args[0], own_down, own_up, reader.mask(last.to(out.device)))
        return out + added.to(out.dtype)

    return hook
