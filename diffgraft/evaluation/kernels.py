"""Distances between two sets of embeddings: unbiased estimates of the maximum mean discrepancy (MMD)."""

from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Maps embeddings [n, d] and [m, d] to the kernel's values [n, m]"""


def mmd2(x: Tensor, y: Tensor, kernel: Kernel) -> float:
    """Return the unbiased estimate of MMD² between sets x [n, d] and y [m, d]; it may be below 0.

    Gretton et al. 2012, equation 3: the diagonals of k(x, x) and k(y, y) are left out.
    """
    n, m = len(x), len(y)
    if n < 2 or m < 2:
        raise ValueError(f"sets of {n} and {m} embeddings, expected at least two in each")
    x, y = x.double(), y.double()
    own, other = kernel(x, x), kernel(y, y)
    within_x = (own.sum() - own.trace()) / (n * (n - 1))
    within_y = (other.sum() - other.trace()) / (m * (m - 1))
    return float(within_x + within_y - 2 * kernel(x, y).mean())


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """Return (x · y + 1)³, the kernel of KID for unit vectors [n, d] and [m, d].

    Bińkowski et al. 2018 (arXiv:1801.01401) have (x · y / d + 1)³ for d features of unit scale. For unit vectors,
    scaled by √d, x · y / d is their cosine.
    """
    return (x @ y.T + 1) ** 3


def gaussian(x: Tensor, y: Tensor, width: float = 10.0) -> Tensor:
    """Return exp(−‖x − y‖² / (2 · width²)), the kernel of CMMD (Jayasumana et al. 2024, arXiv:2401.09603)."""
    squares = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.exp(-squares / (2 * width**2))
