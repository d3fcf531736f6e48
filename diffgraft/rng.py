"""Seeded random numbers: every number is a function of a seed and of the place it is for, never of what ran before.

A place is a tuple of integers, such as (position of the sample, stream of noise). Runs that are resumed, cut into other
batches or dealt out to other processes therefore draw the same numbers.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, *place: int) -> torch.Generator:
    """A generator of PyTorch's, on the CPU, for one place."""
    state = np.random.SeedSequence([seed, *place]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def normal(shape: Sequence[int], seed: int, *place: int) -> Tensor:
    """Standard normal numbers of `shape` for one place, on the CPU, in float32."""
    return torch.randn(tuple(shape), generator=generator(seed, *place))


def numpy_generator(seed: int, *place: int) -> np.random.Generator:
    """A generator of numpy's for one place."""
    return np.random.default_rng([seed, *place])


@lru_cache(4096)
def permutation(count: int, seed: int, *place: int) -> tuple[int, ...]:
    """The numbers 0 … `count` − 1 in the order of one place."""
    return tuple(numpy_generator(seed, *place).permutation(count).tolist())
