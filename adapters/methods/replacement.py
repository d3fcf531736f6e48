"""A weight that replaces another, as in files of Custom Diffusion (Kumari et al. 2023, arXiv:2212.04488, section 3.1).

They hold the new keys and values of the cross-attention, not the differences, and are read, merged and converted; here
the method `custom` trains differences, from which such files are written with the weights of the base.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diffgraft.adapters.adapter import Delta
from diffgraft.adapters.projections import same_layer


@dataclass(frozen=True, repr=False)
class ReplacementDelta(Delta):
    """W' = W + strength · (R − W), and the same for the bias, if there is one."""

    leaves: Mapping[str, Tensor]
    """R as ``weight``, in the shape of the weight, and optionally ``bias`` [out]"""

    kind = "replacement"
    alpha = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.leaves["weight"].shape)

    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        weight = weight.float()
        replaced = weight + strength * (self.leaves["weight"].float().to(weight.device).view(weight.shape) - weight)
        if bias is not None and "bias" in self.leaves:
            bias = bias.float() + strength * (self.leaves["bias"].float().to(bias.device) - bias.float())
        return replaced, bias

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        bias_fits = "bias" not in self.leaves or self.leaves["bias"].shape == weight_shape[:1]
        return same_layer(tuple(self.leaves["weight"].shape), tuple(weight_shape)) and bias_fits


def read(leaves: Mapping[str, Tensor], alpha: float | None) -> Delta:  # noqa: ARG001  (a replacement has no alpha)
    """Build the replacement from its leaves. Raises ValueError for other leaves than a weight and its bias."""
    if "weight" not in leaves or not set(leaves) <= {"weight", "bias"}:
        raise ValueError(f"{', '.join(sorted(leaves))} are not a weight and its bias")
    return ReplacementDelta(dict(leaves))


KINDS = {"replacement": read}
