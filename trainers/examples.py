"""Training examples, and which of them a step sees: a function of the seed and the step, never of what ran before."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffgraft.data.latents import Latents
from diffgraft.data.pictures import Picture


@dataclass(frozen=True)
class Examples:
    """n pictures as latents, the prompt of each, and what to call it."""

    latents: Latents
    prompts: Sequence[str]
    names: Sequence[str]

    def rows(self, seed: int, first: int, count: int) -> list[int]:
        """Which examples stand at places `first` … `first + count` of an endless, shuffled line.

        Each round through the examples has an order of its own.
        """
        n, out = len(self.latents), []
        for place in range(first, first + count):
            order = np.random.default_rng([seed, 0, place // n]).permutation(n)
            out.append(int(order[place % n]))
        return out


def generator(seed: int, *what: int) -> torch.Generator:
    """A generator for this purpose alone; `what` says which (step, kind of noise, …)."""
    state = np.random.SeedSequence([seed, *what]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def normal(shape: Sequence[int], seed: int, *what: int) -> Tensor:
    """Standard normal noise on the CPU, the same wherever it is used."""
    return torch.randn(tuple(shape), generator=generator(seed, *what))


def data_digest(pictures: Sequence[Picture], prompts: Sequence[Sequence[str]]) -> str:
    """SHA-256 over the pixels and prompts of a data set, in order."""
    digest = hashlib.sha256()
    for picture, shown in zip(pictures, prompts, strict=True):
        digest.update(f"{picture.image.size} {' | '.join(shown)}\n".encode())
        digest.update(picture.image.tobytes())
    return digest.hexdigest()
