"""Ranks by timestep: a LoRA of which fewer ranks act, the noisier the latents are (T-LoRA).

Soboleva et al. 2025, arXiv:2507.05964. At timestep t of T, r(t) of r ranks act, in training and in drawing:

    r(t) = ⌊((T − t) / T)^α · (r − r_min)⌋ + r_min

as `get_mask_by_timestep` in the authors' code. Here every sample of a batch has the ranks of its own timestep; there,
the whole batch has those of its first sample.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from diffgraft.adapters.patch import run_layer
from diffgraft.bases.registry import schedule_timesteps
from diffgraft.errors import one_line

_ROUNDING = 1e-5
"""Timesteps by which rounding must not remove a rank; two ranks of 8192 end 0.1 timesteps apart"""


class RankSchedule(BaseModel):
    """How many ranks of a LoRA act at a timestep; adapter files store it as JSON."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    timesteps: int = Field(1000, ge=1)
    """T, the number of timesteps of the base's noise schedule"""
    min_rank: int | None = Field(None, ge=1)
    """r_min, the number of ranks that act at the noisiest timestep, T; None: half of them, and at least one"""
    exponent: float = Field(1.0, gt=0)
    """α; above 1, ranks end at less noisy timesteps"""
    has_start: bool = True
    """Whether the second half of the ranks is a fixed start, which is subtracted; rank i and its start act together"""

    def last_timesteps(self, rank: int) -> Tensor:
        """Return the last timestep at which each of `rank` ranks acts, start included: [rank], float64.

        Ranks that always act have an infinite one.
        """
        trained = rank // 2 if self.has_start else rank
        least = min(trained, max(1, trained // 2) if self.min_rank is None else self.min_rank)
        shares = torch.arange(1, trained - least + 1, dtype=torch.float64) / max(1, trained - least)
        ending = self.timesteps * (1 - shares ** (1 / self.exponent)) + _ROUNDING
        last = torch.cat([torch.full((least,), torch.inf, dtype=torch.float64), ending])
        return last.repeat(2) if self.has_start else last

    def active(self, rank: int, timestep: float) -> int:
        """Return r(t): how many of `rank` ranks act at a timestep; a rank and its start count as one."""
        active = int((self.last_timesteps(rank) >= timestep).sum())
        return active // 2 if self.has_start else active

    @classmethod
    def from_json(cls, value: Any) -> "RankSchedule":
        """Return the schedule of a file's header. Raises ValueError if it is invalid."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ValueError(f"its schedule of ranks is invalid: {one_line(error)}") from error


_ARGUMENTS = ("timestep", "t")
"""Names of the timesteps among the arguments of denoisers; Z-Image has the second"""
_READERS: WeakKeyDictionary[nn.Module, list["TimestepReader"]] = WeakKeyDictionary()
"""Network → the readers that watch it"""


class TimestepReader:
    """Reads the timesteps that a network is called with, for adapters on the layers inside it."""

    def __init__(self, network: nn.Module) -> None:
        """Watch the calls of `network`; without a parameter `timestep`, as in text encoders, there is nothing to read.

        The timesteps stay readable after a call, for gradient checkpointing, which runs blocks again.
        """
        self.timesteps: Tensor | None = None
        """Timesteps [n], or [1] for a whole batch, of the latest call"""
        parameters = list(inspect.signature(type(network).forward).parameters)[1:]
        self._name = next((name for name in _ARGUMENTS if name in parameters), None)
        self._place = None if self._name is None else parameters.index(self._name)
        self._to_schedule = schedule_timesteps(network)
        self._hook = network.register_forward_pre_hook(self._read, with_kwargs=True)
        self._others = _READERS.setdefault(network, [])
        self._others.append(self)

    def _read(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if self._place is not None:
            value = args[self._place] if len(args) > self._place else kwargs.get(str(self._name))
            given = None if value is None else torch.as_tensor(value).reshape(-1)
            self.timesteps = None if given is None else self._to_schedule(given)

    @property
    def can_read(self) -> bool:
        """Whether the denoiser is called with timesteps, which ranks can depend on."""
        return self._place is not None

    def mask(self, last: Tensor) -> Tensor | None:
        """Return 1 for each rank that acts, else 0, for each sample: [n, r]; None if no timesteps are known.

        Args:
            last: last timestep of each rank, [r], or of the ranks of each sample, [n, r].
        """
        if self.timesteps is None:
            return None
        return (self.timesteps.to(last.device)[:, None] <= last).to(torch.float32)

    def remove(self) -> None:
        """Remove the hook that reads the denoiser's timesteps."""
        self._hook.remove()
        self._others.remove(self)


def timesteps_as_now(network: nn.Module) -> AbstractContextManager[None]:
    """Return a block within which all readers of a network tell the timesteps that they tell now.

    Gradient checkpointing runs parts of the network again in it, when the network may have been called with others.
    """
    return _telling([(reader, reader.timesteps) for reader in _READERS.get(network, ())])


@contextmanager
def _telling(timesteps: Sequence[tuple[TimestepReader, Tensor | None]]) -> Iterator[None]:
    before = [reader.timesteps for reader, _ in timesteps]
    try:
        for reader, own in timesteps:
            reader.timesteps = own
        yield
    finally:
        for (reader, _), own in zip(timesteps, before, strict=True):
            reader.timesteps = own


def masked_product(layer: nn.Module, x: Tensor, down: Tensor, up: Tensor, mask: Tensor | None) -> Tensor:
    """Apply up · diag(mask) · down to a layer's input.

    Args:
        layer: linear layer or convolution, which has stride, padding and groups.
        x: its input, [n, …, in] or [n, in, h, w].
        down: [r, in] or [r, in / groups, …kernel].
        up: [out, r] or [out, r, 1, 1].
        mask: factor on each rank for each sample, [n, r] or [1, r]; None: all ranks act. If the input has a multiple
            of n rows, as in layers that see each token of a text by itself, those of a sample follow one another.
    """
    if mask is not None and len(mask) not in (1, len(x)):
        mask = mask.repeat_interleave(len(x) // len(mask), 0)
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return _grouped_product(layer, x, down, up, mask)
    inner = run_layer(layer, x, down)
    if mask is not None:
        sides = (1, 1) if isinstance(layer, nn.Conv2d) else ()
        middle = (1,) * (inner.ndim - 2 - len(sides))
        inner = inner * mask.to(inner.dtype).view(len(mask), *middle, -1, *sides)
    return F.conv2d(inner, up) if isinstance(layer, nn.Conv2d) else F.linear(inner, up)


def _grouped_product(layer: nn.Conv2d, x: Tensor, down: Tensor, up: Tensor, mask: Tensor | None) -> Tensor:
    """Apply the whole matrices, as a single `down` cannot express groups with inputs of their own."""
    wide, thin = up.flatten(1), down.flatten(1)
    shape = (len(up), *down.shape[1:])
    if mask is None or len(mask) == 1:
        return run_layer(layer, x, ((wide if mask is None else wide * mask[0]) @ thin).view(shape))
    rows = [run_layer(layer, x[row : row + 1], ((wide * mask[row]) @ thin).view(shape)) for row in range(len(x))]
    return torch.cat(rows)
