"""Noise of pictures: a stream of normal numbers for each seed, as diffusers and ComfyUI or as webui draws it."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

NoiseSource = Literal["cpu", "gpu"]
"""``cpu``: PyTorch's generator on the CPU, as in diffusers and ComfyUI. ``gpu``: that of CUDA, as in webui"""


class NoiseStream(Protocol):
    """Normal numbers for one picture; each call continues the stream."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers of a shape, float32 on the CPU."""
        ...


class CpuNoise:
    """Noise of PyTorch's generator on the CPU."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers of a shape, float32 on the CPU."""
        return torch.randn(tuple(shape), generator=self._generator)


class GpuNoise:
    """The numbers of ``torch.randn(…, device="cuda")``, without a GPU.

    Philox 4×32 with ten rounds (Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*), of which CUDA turns
    the first two words into one normal number by the method of Box and Muller. Up to 2³² numbers a call.
    """

    _FACTORS = (0xD2511F53, 0xCD9E8D57)
    _KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
    _ROUNDS = 10

    def __init__(self, seed: int) -> None:
        self._seed, self._calls = seed & (2**64 - 1), 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers of a shape, float32 on the CPU."""
        first, second = self._words(math.prod(shape))
        self._calls += 1
        scale = np.float32(2.3283064e-10)  # 2⁻³², as CUDA has it
        turn = scale * np.float32(6.2831855)
        radius = np.sqrt(-2.0 * np.log(first * scale + scale / 2))
        values = (radius * np.sin(second * turn + turn / 2)).astype(np.float32)
        return torch.from_numpy(values.reshape(tuple(shape)))

    def _words(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first two words of `count` blocks, uint32 [count] each."""
        index = np.arange(count, dtype=np.uint64)
        blank = np.zeros(count, np.uint64)
        words = [blank + np.uint64(self._calls), blank, index, blank]
        half, bits = np.uint64(32), np.uint64(0xFFFFFFFF)
        keys = (self._seed & 0xFFFFFFFF, self._seed >> 32)
        for turn in range(self._ROUNDS):
            first, second = (
                np.uint64((key + turn * step) & 0xFFFFFFFF) for key, step in zip(keys, self._KEY_STEPS, strict=True)
            )
            zero, two = (words[place] * np.uint64(factor) for place, factor in zip((0, 2), self._FACTORS, strict=True))
            words = [
                two >> half ^ words[1] ^ first,
                two & bits,
                zero >> half ^ words[3] ^ second,
                zero & bits,
            ]
        return words[0].astype(np.uint32), words[1].astype(np.uint32)


class BrownianPath:
    """Noise of steps as differences of a Brownian path, one for each picture.

    Samplers that look at several noise levels in a step then see one random process, whatever the steps. The numbers
    are those of k-diffusion's ``BrownianTreeNoiseSampler``, on the CPU or, as webui patches it, with those of CUDA.
    """

    def __init__(
        self, source: NoiseSource, seeds: Sequence[int], shape: Sequence[int], sigmas: Sequence[float]
    ) -> None:
        """Prepare the paths.

        Args:
            source: whose random numbers are used.
            seeds: seed of each picture.
            shape: shape of the latents of one picture.
            sigmas: noise levels of all steps; the path ends at the smallest above 0.
        """
        from torchsde import BrownianTree

        least, most = min(sigma for sigma in sigmas if sigma > 0), max(sigmas)
        self._source: NoiseSource = source
        with self._own_numbers():
            self._trees = [
                BrownianTree(torch.tensor(least), torch.zeros(tuple(shape)), torch.tensor(most), entropy=seed)
                for seed in seeds
            ]

    def __call__(self, before: float, after: float) -> Tensor:
        """Return standard normal noise [n, …] for the step between two noise levels, float32 on the CPU."""
        low, high = torch.tensor(min(before, after)), torch.tensor(max(before, after))
        sign = 1.0 if before < after else -1.0
        with self._own_numbers():
            path = torch.stack([tree(low, high) for tree in self._trees])
        noise: Tensor = sign * path / (high - low).sqrt()
        return noise

    @contextmanager
    def _own_numbers(self) -> Iterator[None]:
        """Let torchsde draw the numbers of the source; it has no setting for that."""
        from torchsde._brownian import brownian_interval

        def draw(size: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
            return noise_stream(self._source, int(seed)).normal(size).to(device, dtype)

        held = brownian_interval._randn
        brownian_interval._randn = draw
        try:
            with warnings.catch_warnings():
                # levels are float32, as in k-diffusion, and torchsde compares them with rounded ones
                warnings.filterwarnings("ignore", "Should have t[ab]")
                yield
        finally:
            brownian_interval._randn = held


def noise_stream(source: NoiseSource, seed: int) -> NoiseStream:
    """Return the noise stream of a seed for a source of noise."""
    return CpuNoise(seed) if source == "cpu" else GpuNoise(seed)


def start_noise(
    streams: Sequence[NoiseStream],
    shape: Sequence[int],
    variations: Sequence[NoiseStream] | None = None,
    strength: float = 0.0,
) -> Tensor:
    """Return the noise [n, …] that n pictures start from.

    Args:
        streams: stream of each picture.
        shape: shape of the latents of one picture.
        variations: streams of webui's variation seeds, toward which the noise is turned.
        strength: how far it is turned, from 0 to 1.
    """
    noise = torch.stack([stream.normal(shape) for stream in streams])
    if variations is None or strength == 0:
        return noise
    other = torch.stack([stream.normal(shape) for stream in variations])
    return torch.stack([_turned(strength, own, goal) for own, goal in zip(noise, other, strict=True)])


def _turned(share: float, start: Tensor, end: Tensor) -> Tensor:
    """Interpolate between two noises [c, h, w] along the sphere (Shoemake 1985), or along a line if they are parallel.

    As in webui, each column [h] of a channel is a vector with an angle of its own.
    """
    unit_start, unit_end = (value / value.norm(dim=1, keepdim=True) for value in (start, end))
    cosine = (unit_start * unit_end).sum(1)
    if cosine.mean() > 0.9995:
        return start * (1 - share) + end * share
    angle = cosine.acos()
    sine = angle.sin()
    own, other = (((part * angle).sin() / sine).unsqueeze(1) for part in (1 - share, share))
    turned: Tensor = own * start + other * end
    return turned
