"""T-LoRAs without their timesteps: as other programs, merged weights and sums of adapters apply them."""

import warnings
from dataclasses import replace

import torch

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats.header import RANK_SCHEDULE


def at_all_timesteps(name: str, adapter: Adapter) -> Adapter:
    """Return an adapter whose ranks all act at all timesteps; a warning names it by `name` if that changes it."""
    if not (share := excess_share(adapter)):
        return adapter
    warnings.warn(
        f"{name} is a T-LoRA, with fewer ranks at noisier timesteps: the result has all of its ranks at all timesteps, "
        f"which at the noisiest one are {100 * share:.0f} % of its change too much. To draw as it was trained, give "
        "the file itself.",
        stacklevel=3,
    )
    deltas = {path: tuple(map(_without_schedule, own)) for path, own in adapter.deltas.items()}
    metadata = {key: value for key, value in adapter.metadata.items() if key != RANK_SCHEDULE}
    return replace(adapter, deltas=deltas, metadata=metadata)


def excess_share(adapter: Adapter) -> float:
    """Return ‖ΔW − ΔW(T)‖ / ‖ΔW‖ over all T-LoRAs of an adapter, with ΔW(T) of the noisiest timestep; 0 without any.

    It is what a program gets wrong there that applies all ranks; at less noisy timesteps it is less.
    """
    excess = total = 0.0
    for deltas in adapter.deltas.values():
        for delta in deltas:
            if isinstance(delta, FactorDelta) and delta.rank_schedule is not None:
                ends = delta.rank_schedule.last_timesteps(delta.rank).isfinite()
                total += _squared_norm(delta, torch.ones_like(ends))
                excess += _squared_norm(delta, ends)
    return (excess / total) ** 0.5 if total > 0 else 0.0


def _squared_norm(delta: FactorDelta, ranks: torch.Tensor) -> float:
    """Squared norm of the product of some ranks, from products of the factors with themselves."""
    factors = delta.low_rank_factors(1.0)
    assert factors is not None
    up, down = factors[0][:, ranks].double(), factors[1][ranks].double()
    return max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))


def _without_schedule(delta: Delta) -> Delta:
    return replace(delta, rank_schedule=None) if isinstance(delta, FactorDelta) else delta
