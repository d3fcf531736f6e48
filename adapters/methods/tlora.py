"""T-LoRA: a LoRA of which fewer ranks train and act, the noisier the timestep, for subjects of one picture.

Soboleva et al. 2025, arXiv:2507.05964. With the mask m(t) of `diffgraft.adapters.rank_schedule` over r ranks:

    W'(t) = W + (alpha / r) · (P · diag(λ ∘ m(t)) · Q − P₀ · diag(λ₀ ∘ m(t)) · Q₀)

P [out, r], λ [r] and Q [r, in] begin as singular vectors and values, P₀, λ₀ and Q₀ (Ortho-LoRA), so that ranks are
independent from the start, and a mask takes a part away. With `options.init=zero` it is a LoRA under the mask (the
paper's vanilla T-LoRA). A file holds a LoRA of rank 2 r, which other programs apply with all ranks at all timesteps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from diffgraft.adapters.adapter import Delta
from diffgraft.adapters.factors import FactorDelta, FactorLayer, RankOptions, check_patterns
from diffgraft.adapters.method import Method, Spec
from diffgraft.adapters.methods.lora import LOW_RANK
from diffgraft.adapters.patch import AdapterLayer, AttachedLayers, Make, to_cpu_float32, weight_shape
from diffgraft.adapters.projections import match_conv_axes
from diffgraft.adapters.rank_schedule import RankSchedule, TimestepReader, masked_product
from diffgraft.bases import Base
from diffgraft.bases.layers import is_of_text, parts_of
from diffgraft.bases.quantized import weight_and_bias
from diffgraft.errors import DiffgraftError

_TIMESTEPS = 1000
"""Length of the noise schedule of a target that has no scheduler"""
_FACTORS = ("lora_up", "lora_down")


class TloraOptions(RankOptions):
    """Options of T-LoRA beside rank and alpha."""

    min_rank: PositiveInt | None = None
    """Ranks that act at the noisiest timestep; unset: half of each layer's rank, as the authors set it"""
    exponent: PositiveFloat = 1.0
    """Exponent of the share of ranks beyond `min_rank`; above 1, ranks end at less noisy timesteps"""
    init: Literal["last", "middle", "first", "zero"] = "last"
    """Start from the singular vectors of the smallest (last), middle or largest (first) singular values of a matrix, or
    as an ordinary LoRA, from zero"""
    init_matrix: Literal["random", "weight"] = "random"
    """Matrix that these singular vectors are of: random numbers, or the weight of the layer"""
    loraplus_ratio: float = Field(1.0, gt=0)
    """Factor on the learning rate of the up projection"""


@dataclass(frozen=True)
class Timing:
    """What decides which ranks of a layer act."""

    schedule: RankSchedule
    reader: TimestepReader | None
    """Reader of the timesteps; None in text encoders, where all ranks act"""


class MaskedLayer(FactorLayer):
    """A LoRA on a live layer, with the ranks of each sample's timestep."""

    last: Tensor
    """Last timestep of each rank [r]"""

    def __init__(
        self, layer: nn.Module, rank: int, alpha: float, generator: torch.Generator, timing: Timing, up_ratio: float
    ) -> None:
        super().__init__(LOW_RANK, layer, rank, alpha, generator, {"lora_up": up_ratio})
        self._timing = timing
        self._set_last()

    def _set_last(self) -> None:
        """Set the last timestep of each rank that the leaves have now."""
        rank, schedule = self._factors.rank(self.leaves), self._timing.schedule  # type: ignore[arg-type]
        last = schedule.last_timesteps(2 * rank)[:rank] if schedule.has_start else schedule.last_timesteps(rank)
        self.register_buffer("last", last.float().to(self.leaves["lora_up"].device), persistent=False)

    @property
    def _schedule(self) -> RankSchedule | None:
        """The schedule of this layer's delta."""
        return None if self._timing.reader is None else self._timing.schedule

    def forward(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        return torch.add(out, self.contribution(layer, x).to(out.dtype))

    def contribution(self, layer: nn.Module, x: Tensor) -> Tensor:
        leaves, x = self._leaves_and_input(x)
        return self._scale * self._product(layer, x, leaves["lora_down"], leaves["lora_up"])

    def _product(self, layer: nn.Module, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Apply up · diag(m(t)) · down to the layer's input."""
        mask = None if self._timing.reader is None else self._timing.reader.mask(self.last)
        return masked_product(layer, x, down, up, mask)

    def load(self, delta: Delta, layer: nn.Module) -> None:
        """Take the values of a LoRA, with or without ranks by timestep; those of this run's options count from now."""
        if delta.rank_schedule is not None and delta.rank_schedule.has_start:
            raise ValueError("is a T-LoRA with a start: set options.init to another value than zero")
        super().load(replace(delta, rank_schedule=None) if isinstance(delta, FactorDelta) else delta, layer)
        self._set_last()

    def delta(self) -> FactorDelta:
        return replace(super().delta(), rank_schedule=self._schedule)


class OrthogonalLayer(MaskedLayer):
    """T-LoRA on a live layer: P, λ and Q are its leaves, and the start is subtracted."""

    start_up: Tensor
    """P₀"""
    start_down: Tensor
    """diag(λ₀) · Q₀"""

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        timing: Timing,
        options: TloraOptions,
    ) -> None:
        """Start without an effect; for layers with a side smaller than `rank`, the rank is that side.

        Raises:
            ValueError: the layer does not give its weight, from which `options.init_matrix=weight` starts.
        """
        shape = weight_shape(layer)
        sides = shape[0], math.prod(shape[1:])
        kept = min(rank, *sides)
        super().__init__(layer, kept, alpha / rank * kept, generator, timing, options.loraplus_ratio)
        up, down = self.leaves["lora_up"], self.leaves["lora_down"]
        values = torch.ones(kept)
        if not layer.weight.is_meta:  # plans need the shapes alone
            is_random = options.init_matrix == "random"
            matrix = torch.randn(sides, generator=generator) / kept if is_random else _weight_matrix(layer)
            left, values, right = singular_triples(matrix, kept, options.init)
            up.data.copy_(left.reshape(up.shape))
            down.data.copy_(right.reshape(down.shape))
        self.leaves["lora_values"] = nn.Parameter(values)
        self._set_start(up, self._folded_down())

    def _set_start(self, up: Tensor, down: Tensor) -> None:
        self.register_buffer("start_up", up.detach().clone(), persistent=False)
        self.register_buffer("start_down", down.detach().clone(), persistent=False)

    def _folded_down(self) -> Tensor:
        """Return diag(λ) · Q."""
        down = self.leaves["lora_down"]
        folded: Tensor = self.leaves["lora_values"].view(-1, *[1] * (down.ndim - 1)) * down
        return folded

    def contribution(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return what is added to the output, from differences of the factors: those of products would be rounded."""
        _, x = self._leaves_and_input(x)
        up = self.leaves["lora_up"]
        moved_down = self._product(layer, x, self._folded_down() - self.start_down, up)
        return self._scale * (moved_down + self._product(layer, x, self.start_down, up - self.start_up))

    def weight(self, layer: nn.Module) -> Tensor:
        """Compute ΔW of all ranks for this layer, scale included."""
        shape = weight_shape(layer)
        now = self._factors.weight({"lora_up": self.leaves["lora_up"], "lora_down": self._folded_down()}, shape)
        start = self._factors.weight({"lora_up": self.start_up, "lora_down": self.start_down}, shape)
        return self._scale * (now - start)

    def load(self, delta: Delta, layer: nn.Module) -> None:
        """Take values, start and scale of a T-LoRA; the norms of its down projection become λ.

        Raises:
            ValueError: it is no T-LoRA with a start, or does not fit the layer.
        """
        shape, schedule = weight_shape(layer), delta.rank_schedule
        is_ours = isinstance(delta, FactorDelta) and set(delta.leaves) == set(_FACTORS) and delta.rank % 2 == 0
        if not is_ours or (schedule is None or not schedule.has_start) != (self._timing.reader is None):
            raise ValueError("is no T-LoRA with a start: train it with method=tlora, or set options.init=zero")
        if not delta.fits(shape):
            raise ValueError(f"does not fit this base's layer of shape {' × '.join(map(str, shape))}")
        assert isinstance(delta, FactorDelta)
        given, rank, device = match_conv_axes(delta.leaves, shape), delta.rank // 2, self.start_up.device
        up, down = (given[name].to(device, torch.float32) for name in _FACTORS)
        values = down[:rank].flatten(1).norm(dim=1)
        values = torch.where(values > 0, values, torch.ones_like(values))
        trained = {
            "lora_up": up[:, :rank].clone(),
            "lora_down": down[:rank] / values.view(-1, *[1] * (down.ndim - 1)),
            "lora_values": values,
        }
        self._alpha, self._scale = delta.alpha / 2, delta.scale
        self.leaves = nn.ParameterDict({name: nn.Parameter(trained[name]) for name in self.leaves})
        self._set_start(-up[:, rank:], down[rank:])
        self._set_last()

    def delta(self) -> FactorDelta:
        """Return the change as a LoRA of rank 2 r, whose second half is the start."""
        now = to_cpu_float32({"lora_up": self.leaves["lora_up"], "lora_down": self._folded_down()})
        start = to_cpu_float32({"lora_up": self.start_up, "lora_down": self.start_down})
        leaves = {
            "lora_up": torch.cat([now["lora_up"], -start["lora_up"]], 1),
            "lora_down": torch.cat([now["lora_down"], start["lora_down"]]),
        }
        return FactorDelta(LOW_RANK, leaves, 2 * self._alpha, self._schedule)


def singular_triples(matrix: Tensor, rank: int, which: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return `rank` singular triples of a matrix [out, in]: P₀ [out, r], λ₀ [r] and Q₀ [r, in].

    Args:
        matrix: the matrix.
        rank: r, at most as large as both sides.
        which: those of the largest (``first``), ``middle`` or smallest (``last``) singular values.
    """
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    begin = {"first": 0, "middle": math.ceil((len(values) - rank) / 2), "last": len(values) - rank}[which]
    kept = slice(begin, begin + rank)
    return left[:, kept], values[kept], right[kept]


def _weight_matrix(layer: nn.Module) -> Tensor:
    """Return a live layer's weight as a matrix. Raises ValueError if another tool has quantized it."""
    weight, _ = weight_and_bias(layer)
    if not weight.is_floating_point() or tuple(weight.shape) != weight_shape(layer):
        raise ValueError("its weight is quantized")
    return weight.detach().flatten(1).cpu()


class AttachedTlora(AttachedLayers):
    """T-LoRA on live layers, with readers of the timesteps that the denoiser is called with."""

    def __init__(self, target: Any, spec: Spec) -> None:
        """Attach to the layers of a `Spec`.

        Raises:
            DiffgraftError: a key of the options `ranks` or `alphas` matches no adapted layer, a layer does not give its
                weight to start from, or the denoiser of a base is not called with timesteps.
        """
        check_patterns(spec)
        networks = {part: network for part, network in parts_of(target).items() if part in spec.paths}
        options: TloraOptions = spec.options
        if options.min_rank is not None and options.min_rank >= spec.rank:
            raise DiffgraftError(
                f"Invalid value options.min_rank={options.min_rank}: must be below rank={spec.rank}, as otherwise all "
                "ranks act at all timesteps."
            )
        self._readers = {part: TimestepReader(network) for part, network in networks.items() if not is_of_text(part)}
        try:
            if isinstance(target, Base) and not all(reader.can_read for reader in self._readers.values()):
                raise DiffgraftError(
                    f"method=tlora cannot train bases of the family {target.family.name}: their "
                    f"{target.family.denoiser} has no argument `timestep`, by which ranks are chosen. Use method=lora."
                )
            super().__init__(target, spec, _make(target, spec, self._readers))
        except BaseException:
            self._stop_reading()
            raise

    def _stop_reading(self) -> None:
        for reader in self._readers.values():
            reader.remove()

    def detach(self) -> None:
        super().detach()
        self._stop_reading()


def _make(target: Any, spec: Spec, readers: Mapping[str, TimestepReader]) -> Make:
    """Return the factory of adapter layers for a `Spec`."""
    options: TloraOptions = spec.options
    config = getattr(getattr(target, "scheduler", None), "config", None)
    schedule = RankSchedule(
        timesteps=getattr(config, "num_train_timesteps", _TIMESTEPS),
        min_rank=options.min_rank,
        exponent=options.exponent,
        has_start=options.init != "zero",
    )

    def make(path: str, layer: nn.Module, generator: torch.Generator) -> AdapterLayer:
        rank, alpha = options.size(path, spec.rank, spec.alpha)
        timing = Timing(schedule, readers.get(path.partition(".")[0]))
        if options.init == "zero":
            return MaskedLayer(layer, rank, alpha, generator, timing, options.loraplus_ratio)
        try:
            return OrthogonalLayer(layer, rank, alpha, generator, timing, options)
        except ValueError as error:
            raise DiffgraftError(f"options.init_matrix=weight cannot start at {path}: {error}.") from error

    return make


METHOD = Method(
    name="tlora",
    summary="LoRA with fewer ranks at noisier timesteps (T-LoRA): for subjects of one or few pictures",
    attach=AttachedTlora,
    options=TloraOptions,
)
