"""Custom Diffusion (Kumari et al. 2023, arXiv:2212.04488, section 3.1): keys and values of the text, and a new word.

The cross-attention's projections of the text to keys and values are trained as whole matrices, W' = W + ΔW, together
with the embedding of a new word. They are a small part of the denoiser, and the only one through which it sees the
prompt. ΔW starts at zero, and its gradient is that of W', so that training it is training W' itself; but the adapter is
a difference, which needs no base, and which stacks and scales like those of other methods.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgraft.adapters.adapter import Delta, LinearDelta
from diffgraft.adapters.method import NO_FACTORS, Attached, Method, Spec
from diffgraft.adapters.methods.full import FullDelta
from diffgraft.adapters.methods.pivotal import JointOptions, WeightsAndWord
from diffgraft.adapters.patch import AdapterLayer, AttachedLayers, cast_like, to_cpu_float32, weight_shape


class CustomOptions(JointOptions):
    """Options of Custom Diffusion's new word."""

    keep_norm: bool = False
    """Keep the norm of each embedding at its initial value, which the paper does not"""


class ContextLayer(AdapterLayer):
    """A trainable ΔW [out, in], added to the weight of a layer that computes keys or values from text."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.diff = nn.Parameter(torch.zeros(weight_shape(layer)))

    def forward(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:  # noqa: ARG002  (not needed)
        """Return the keys or values [n, tokens, out] of the states `x` [n, tokens, in].

        Every prompt begins with the same token, to which most of the attention goes. As in the authors' code, its key
        and value give no gradient, so that training does not change what all prompts have in common.
        """
        adapted = out + F.linear(cast_like(x, self.diff), self.diff).to(out.dtype)
        return torch.cat([adapted[:, :1].detach(), adapted[:, 1:]], 1)

    def load(self, delta: Delta, layer: nn.Module) -> None:
        """Start from what a delta of any kind adds to the weight."""
        shape = weight_shape(layer)
        if not delta.fits(shape):
            raise ValueError(f"does not fit this base's layer of shape {' × '.join(map(str, shape))}")
        weight = layer.weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            if isinstance(delta, LinearDelta):
                self.diff.copy_(delta.delta(shape))
            elif weight.is_floating_point():
                self.diff.copy_(delta.apply(weight, None, 1.0)[0] - weight.float())
            else:
                raise ValueError(f"is a {delta.kind}, a function of the weight, which is quantised: set quantize=none")

    def delta(self) -> Delta:
        return FullDelta(to_cpu_float32({"diff": self.diff}))


def attach(target: Any, spec: Spec) -> Attached:
    weights = AttachedLayers(target, spec, lambda path, layer, generator: ContextLayer(layer))  # noqa: ARG005
    return WeightsAndWord(weights, target, spec)


METHOD = Method(
    name="custom",
    summary="Custom Diffusion: a new word, and the whole keys and values of cross-attention",
    attach=attach,
    options=CustomOptions,
    layers="context",
    unsupported={
        **NO_FACTORS,
        "layers": "it trains the keys and values of cross-attention",
        "text_encoder": "it trains the keys and values of cross-attention, and of the text encoder only a new word",
    },
    learns_token=True,
)
