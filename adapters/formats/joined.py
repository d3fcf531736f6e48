"""Several deltas of one module as one, for dialects that have one name for each module."""

from collections.abc import Sequence

import torch

from diffgraft.adapters.adapter import Delta, LinearDelta
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.methods.full import FullDelta
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.ops.effect import refuse_vast
from diffgraft.adapters.projections import laid_out


def joined(path: str, deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    """The deltas of the module at `path` as at most one of its weight, and behind it one of its bias alone.

    LoRAs stand side by side in one of the sum of their ranks; other matrices are added up to a whole difference.

    Raises:
        ValueError: several are no sum, or the shape of their sum cannot be told.
    """
    of_bias = [delta for delta in deltas if set(delta.leaves) == {"diff_b"}]
    of_weight = [delta for delta in deltas if set(delta.leaves) != {"diff_b"}]
    bias = (of_bias[0],) if len(of_bias) == 1 else ()
    if len(of_bias) > 1:
        bias = (FullDelta({"diff_b": torch.stack([delta.leaves["diff_b"].float() for delta in of_bias]).sum(0)}),)
    if len(of_weight) < 2:
        return (*of_weight, *bias)
    loras = [delta for delta in of_weight if set(delta.leaves) == {"lora_down", "lora_up"}]
    if len(loras) == len(of_weight):
        return (_side_by_side(loras), *bias)
    shape = next((shape for delta in of_weight if (shape := delta.weight_shape)), None)
    linear = [delta for delta in of_weight if isinstance(delta, LinearDelta)]
    if shape is None or len(linear) < len(of_weight):
        raise ValueError(f"{path} holds {len(of_weight)} deltas, which have no name together in these files")
    refuse_vast(path, shape, of_weight)
    whole = {"diff": torch.stack([delta.delta(shape) for delta in linear]).sum(0)}
    biases = [delta.leaves["diff_b"].float() for delta in (*linear, *bias) if "diff_b" in delta.leaves]
    if biases:
        whole["diff_b"] = torch.stack(biases).sum(0)
    return (FullDelta(whole),)


def _side_by_side(loras: Sequence[Delta]) -> FactorDelta:
    shape = loras[0].weight_shape
    assert shape is not None
    leaves = [laid_out(lora.leaves, shape) for lora in loras]
    scales = [lora.scale for lora in loras if isinstance(lora, FactorDelta)]
    up = torch.cat([scale * own["lora_up"].float().flatten(1) for scale, own in zip(scales, leaves, strict=True)], 1)
    down = torch.cat([own["lora_down"].float() for own in leaves])
    return low_rank(down, up.view(*up.shape, *[1] * (down.ndim - 2)))
