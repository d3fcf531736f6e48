"""Merging of several deltas of one module into one, for dialects with a single name per module."""

from collections.abc import Sequence

import torch

from diffgraft.adapters.adapter import Delta, LinearDelta
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.methods.full import FullDelta
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.ops.effect import check_delta_size
from diffgraft.adapters.projections import match_conv_axes


def join_deltas(path: str, deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    """Merge the deltas of the module at `path` into at most one of its weight, followed by at most one of its bias.

    LoRAs become one LoRA with the sum of their ranks; other matrices are added up to a full difference.

    Raises:
        ValueError: several deltas cannot be summed, or the shape of their sum is unknown.
    """
    bias_deltas = [delta for delta in deltas if set(delta.leaves) == {"diff_b"}]
    weight_deltas = [delta for delta in deltas if set(delta.leaves) != {"diff_b"}]
    bias = (bias_deltas[0],) if len(bias_deltas) == 1 else ()
    if len(bias_deltas) > 1:
        bias = (FullDelta({"diff_b": torch.stack([delta.leaves["diff_b"].float() for delta in bias_deltas]).sum(0)}),)
    if len(weight_deltas) < 2:
        return (*weight_deltas, *bias)
    if any(delta.rank_schedule is not None for delta in weight_deltas):
        raise ValueError(f"{path} holds {len(weight_deltas)} deltas, and a T-LoRA cannot be joined with others")
    loras = [delta for delta in weight_deltas if set(delta.leaves) == {"lora_down", "lora_up"}]
    if len(loras) == len(weight_deltas):
        return (_side_by_side(loras), *bias)
    shape = next((shape for delta in weight_deltas if (shape := delta.weight_shape)), None)
    linear = [delta for delta in weight_deltas if isinstance(delta, LinearDelta)]
    if shape is None or len(linear) < len(weight_deltas):
        raise ValueError(f"{path} holds {len(weight_deltas)} deltas, which such files cannot hold under a single name")
    check_delta_size(path, shape, weight_deltas)
    total = {"diff": torch.stack([delta.delta(shape) for delta in linear]).sum(0)}
    biases = [delta.leaves["diff_b"].float() for delta in (*linear, *bias) if "diff_b" in delta.leaves]
    if biases:
        total["diff_b"] = torch.stack(biases).sum(0)
    return (FullDelta(total),)


def _side_by_side(loras: Sequence[Delta]) -> FactorDelta:
    """One LoRA that is the sum of several, with their factors concatenated along the rank."""
    shape = loras[0].weight_shape
    assert shape is not None
    leaves = [match_conv_axes(lora.leaves, shape) for lora in loras]
    scales = [lora.scale for lora in loras if isinstance(lora, FactorDelta)]
    up = torch.cat([scale * lora["lora_up"].float().flatten(1) for scale, lora in zip(scales, leaves, strict=True)], 1)
    down = torch.cat([lora["lora_down"].float() for lora in leaves])
    return low_rank(down, up.view(*up.shape, *[1] * (down.ndim - 2)))
