"""LoRA that starts from the base's own weight: PiSSA and OLoRA.

The start up₀ · down₀ is a part of the weight W, and what is trained is the change of this part:

    W' = W + (alpha / r) · (up · down − up₀ · down₀)

The base stays as it is, and the adapter is an ordinary LoRA of rank 2 r, as in peft's conversion. PiSSA (Meng et al.
2024, arXiv:2404.02948, section 3) takes the r largest singular values, the root of each in both factors; OLoRA
(Büyükakyüz 2024, arXiv:2406.01775) the first r columns of Q and rows of R.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffgraft.adapters.adapter import Delta
from diffgraft.adapters.factors import FactorDelta, FactorLayer, Factors, Leaves
from diffgraft.adapters.patch import to_cpu_float32, weight_shape
from diffgraft.adapters.projections import match_conv_axes
from diffgraft.bases.quantized import weight_and_bias

Start = Literal["zero", "pissa", "olora"]
"""``zero``: random `down`, and `up` of zeros, as LoRA was published"""


@dataclass(frozen=True)
class Principal:
    """Initialization of a LoRA from the layer's weight (PiSSA, OLoRA)."""

    kind: Start
    """``pissa`` or ``olora``"""
    niter: int = 0
    """Iterations of PiSSA's randomized SVD; 0: the exact one"""


_SAME_START = 0.999
"""Cosine from which two starts count as the same; files may hold them in half precision"""


def principal_factors(weight: Tensor, rank: int, scale: float, start: Principal) -> tuple[Tensor, Tensor]:
    """Return up₀ [out, r] and down₀ [r, in] of a weight [out, in].

    Args:
        weight: weight as a matrix.
        rank: r, at most as large as both sides.
        scale: alpha / r, by which PiSSA divides the singular values.
        start: how. A randomized SVD is a function of the weight alone, so that a resumed run starts from the same.
    """
    if start.kind == "olora":
        q, r = torch.linalg.qr(weight.float())
        return q[:, :rank], r[:rank]
    if start.niter:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            u, values, vt = torch.svd_lowrank(weight.float(), rank, start.niter)
        v = vt.T
    else:
        u, values, v = torch.linalg.svd(weight.float(), full_matrices=False)
    roots = (values[:rank] / scale).sqrt()
    return u[:, :rank] * roots, roots[:, None] * v[:rank]


def _product(layer: nn.Module, rank: int, start: Principal) -> Tensor:
    """Return up₀ · down₀ of a live layer, [out, in · height · width]."""
    weight, _ = weight_and_bias(layer)
    up, down = principal_factors(weight.detach().flatten(1), rank, 1.0, start)
    return up @ down


class PrincipalLayer(FactorLayer):
    """LoRA on a live layer that starts from a part of its weight."""

    def __init__(
        self,
        factors: Factors,
        layer: nn.Module,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        lr_scales: dict[str, float],
        start: Principal,
    ) -> None:
        """Start without an effect; for layers with a side smaller than `rank`, the rank is that side.

        Raises:
            ValueError: the layer does not give its weight, as those quantized by other tools.
        """
        shape, scale = weight_shape(layer), alpha / rank
        rank = min(rank, shape[0], math.prod(shape[1:]))
        super().__init__(factors, layer, rank, scale * rank, generator, lr_scales)
        self._begun_by = start
        weight, _ = weight_and_bias(layer)
        if not weight.is_floating_point() or tuple(weight.shape) != shape:
            raise ValueError("its weight is quantized")
        if not weight.is_meta:  # plans need the shapes alone
            up, down = principal_factors(weight.detach().flatten(1), rank, scale, start)
            for name, value in (("lora_up", up), ("lora_down", down)):
                self.leaves[name].data.copy_(value.reshape(self.leaves[name].shape))
        for name in ("lora_up", "lora_down"):
            self.register_buffer(f"start_{name}", self.leaves[name].detach().clone(), persistent=False)

    def forward(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        return torch.add(out, self.contribution(layer, x).to(out.dtype))

    def contribution(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return what is added to the output, from differences of the factors: those of products would be rounded."""
        leaves, x = self._leaves_and_input(x)
        start = self._start
        moved_down = {"lora_up": leaves["lora_up"], "lora_down": leaves["lora_down"] - start["lora_down"]}
        moved_up = {"lora_up": leaves["lora_up"] - start["lora_up"], "lora_down": start["lora_down"]}
        return self._scale * (self._factors.forward(moved_down, layer, x) + self._factors.forward(moved_up, layer, x))

    def weight(self, layer: nn.Module) -> Tensor:
        shape = weight_shape(layer)
        return super().weight(layer) - self._scale * self._factors.weight(self._start, shape)

    @property
    def _start(self) -> Leaves:
        return {name: self.get_buffer(f"start_{name}") for name in ("lora_up", "lora_down")}

    def load(self, delta: Delta, layer: nn.Module) -> None:
        """Take the values, the start and the scale of a LoRA of rank 2 r that began with the same part of the weight.

        Raises:
            ValueError: it began with another part, or is no such LoRA.
        """
        shape = weight_shape(layer)
        if not isinstance(delta, FactorDelta) or not delta.is_lora or delta.rank % 2 or not delta.fits(shape):
            raise ValueError("is no LoRA that started from this base's weights with options.init")
        given, rank = match_conv_axes(delta.leaves, shape), delta.rank // 2
        device = self.leaves["lora_up"].device
        up, down = (given[name].to(device, torch.float32) for name in ("lora_up", "lora_down"))
        if device.type != "meta":
            begun = self._factors.weight({"lora_up": -up[:, rank:], "lora_down": down[rank:]}, shape).flatten()
            own = _product(layer, rank, self._begun_by).flatten()
            if torch.cosine_similarity(begun, own, 0) < _SAME_START:  # scales may differ
                raise ValueError("did not start from this base's weights with the same options.init")
        self._alpha, self._scale = delta.alpha / 2, delta.scale
        trained = {"lora_up": up[:, :rank].clone(), "lora_down": down[:rank].clone()}
        self.leaves = nn.ParameterDict({name: nn.Parameter(leaf) for name, leaf in trained.items()})
        for name, start in (("lora_up", -up[:, rank:]), ("lora_down", down[rank:])):
            self.register_buffer(f"start_{name}", start.clone(), persistent=False)

    def delta(self) -> FactorDelta:
        """Return the change as a LoRA of rank 2 r."""
        now, start = to_cpu_float32(dict(self.leaves.items())), to_cpu_float32(self._start)
        leaves = {
            "lora_up": torch.cat([now["lora_up"], -start["lora_up"]], 1),
            "lora_down": torch.cat([now["lora_down"], start["lora_down"]]),
        }
        return FactorDelta(self._factors, leaves, 2 * self._alpha)
