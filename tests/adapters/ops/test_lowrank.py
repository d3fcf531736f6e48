"""Reduced matrices are those of numpy's singular value decomposition in float64, whichever way is taken."""

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgraft.adapters.lowrank import LowRankApproximation, RankBudget, approximate, approximate_product
from diffgraft.adapters.ops.effect import total_as_product
from diffgraft.adapters.registry import read_delta
from diffgraft.errors import DiffgraftError


def falling(out: int, n: int, rate: float) -> Tensor:
    """A random matrix whose singular values fall as rate^k."""
    generator = torch.Generator().manual_seed(3)
    short = min(out, n)
    u = torch.linalg.qr(torch.randn(out, short, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(n, short, generator=generator)).Q
    return u * rate ** torch.arange(short) @ v.T


def least(matrix: Tensor, rank: int) -> float:
    """‖rest‖ / ‖matrix‖ after the best approximation of a rank."""
    s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    return float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))


def off(found: LowRankApproximation, matrix: Tensor) -> float:
    return float((found.up.double() @ found.down.double() - matrix.double()).norm() / matrix.double().norm())


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (33, 32)])
@pytest.mark.parametrize("rank", [1, 3, 20])  # far below the sides, and not
def test_the_nearest_of_a_rank(shape: tuple[int, int], rank: int) -> None:
    matrix = falling(*shape, 0.8)
    found = approximate(matrix, RankBudget(rank=rank))
    assert found.up.shape == (shape[0], rank)
    assert off(found, matrix) == pytest.approx(least(matrix, rank), rel=1e-3, abs=1e-6)
    assert found.relative_error == pytest.approx(off(found, matrix), rel=1e-3, abs=1e-3)


def test_the_range_finder_is_as_good_where_values_fall_slowly() -> None:
    matrix = falling(400, 900, 0.995)
    found = approximate(matrix, RankBudget(rank=16))
    assert off(found, matrix) <= 1.005 * least(matrix, 16)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_the_least_rank_that_holds_an_energy(energy: float) -> None:
    matrix = falling(30, 50, 0.8)
    squares = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    wanted = int(np.searchsorted(squares.cumsum() / squares.sum(), energy)) + 1
    found = approximate(matrix, RankBudget(energy=energy))
    assert found.up.shape[1] == wanted
    assert 1 - found.relative_error**2 >= energy
    assert approximate(matrix, RankBudget(rank=2, energy=energy)).up.shape[1] == min(2, wanted)


@pytest.mark.parametrize("rate", [0.8, 0.99])  # the share lies within the first ranks, or far beyond them
def test_large_matrices_have_the_rank_of_their_energy_too(rate: float) -> None:
    matrix = falling(300, 410, rate)
    squares = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    for energy in (0.9, 0.99):
        found = approximate(matrix, RankBudget(energy=energy))
        assert found.up.shape[1] == int(np.searchsorted(squares.cumsum() / squares.sum(), energy)) + 1
        assert off(found, matrix) == pytest.approx(found.relative_error, rel=1e-3)


def test_a_product_is_reduced_without_being_formed() -> None:
    up, down = falling(50, 9, 0.7), falling(9, 80, 0.7)
    for size in (RankBudget(rank=4), RankBudget(energy=0.99)):
        direct, by_product = approximate(up @ down, size), approximate_product(up, down, size)
        assert by_product.up.shape == direct.up.shape
        torch.testing.assert_close(
            by_product.up @ by_product.down, (direct.up @ direct.down).double(), atol=1e-5, rtol=0, check_dtype=False
        )
    whole = approximate_product(up, down, RankBudget(energy=1.0))
    assert off(whole, up.double() @ down.double()) < 1e-6
    wide = approximate_product(
        torch.cat([up] * 7, 1), torch.cat([down] * 7), RankBudget(energy=1.0)
    )  # rank 63 of 50 × 80
    assert wide.up.shape[1] == 9


def test_of_nothing_nothing_is_left() -> None:
    found = approximate(torch.zeros(5, 7), RankBudget(rank=3))
    assert found.up.shape == (5, 0)
    assert found.lora((5, 7)) is None
    assert found.relative_error == 0
    for wrong in ({"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(DiffgraftError, match="Invalid value"):
            RankBudget(**wrong)  # type: ignore[arg-type]


def test_a_loha_in_tucker_s_variant_is_a_product_of_thin_factors() -> None:
    """So that its norm and spectrum need no matrix of a convolution's size."""
    random = torch.Generator().manual_seed(3)
    leaves = {f"hada_t{side}": torch.randn(2, 2, 3, 1, generator=random) for side in (1, 2)}
    leaves |= {f"hada_w{side}_a": torch.randn(2, 30, generator=random) for side in (1, 2)}
    leaves |= {f"hada_w{side}_b": torch.randn(2, 20, generator=random) for side in (1, 2)}
    product = total_as_product([(read_delta("loha", leaves, 1.5), 0.7)], (30, 20, 3, 1))
    assert product is not None
    up, down = (factor.double() for factor in product)
    assert up.shape == (30, 4)
    sides = [
        torch.einsum(
            "ij...,ip,jq->pq...", *(leaves[f"hada_{name}"].double() for name in (f"t{n}", f"w{n}_a", f"w{n}_b"))
        )
        for n in (1, 2)
    ]
    torch.testing.assert_close(up @ down, 0.7 * 1.5 / 2 * (sides[0] * sides[1]).flatten(1), rtol=1e-5, atol=1e-5)
