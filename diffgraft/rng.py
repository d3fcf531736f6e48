"""Seeded random numbers: every number is a function of a seed and a key, never of earlier random numbers.

A key is a tuple of integers, such as (index of the sample, stream of noise). Runs that are resumed, split into other
batches or distributed over other processes therefore draw the same numbers.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, *key: int) -> torch.Generator:
    """Return a PyTorch generator on the CPU for one key."""
    state = np.random.SeedSequence([seed, *key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def normal(shape: Sequence[int], seed: int, *key: int) -> Tensor:
    """Return standard normal numbers of `shape` for `seed` and further integers, on the CPU, in float32."""
    return torch.randn(tuple(shape), generator=generator(seed, *key))


def numpy_generator(seed: int, *key: int) -> np.random.Generator:
    """Return a numpy generator for `seed` and further integers; equal ones give equal numbers."""
    return np.random.default_rng([seed, *key])


@lru_cache(4096)
def permutation(count: int, seed: int, *key: int) -> tuple[int, ...]:
    """Return the numbers 0 to `count` − 1 in a random order, for `seed` and further integers."""
    return tuple(numpy_generator(seed, *key).permutation(count).tolist())
