"""Combining, resizing, extracting, comparing and inspecting, held to the obvious formulas."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta, LinearDelta
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.factors import FactorDelta, Shape
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.adapters.methods.full import FullDelta
from diffgraft.adapters.methods.loha import HADAMARD, HadamardProduct
from diffgraft.adapters.methods.lokr import KRONECKER, Kronecker
from diffgraft.adapters.methods.lora import LowRank, low_rank
from diffgraft.adapters.ops.combine import combine, dare, ties
from diffgraft.adapters.ops.compare import compare
from diffgraft.adapters.ops.extract import extract, fit_loha
from diffgraft.adapters.ops.inspect import inspect
from diffgraft.adapters.ops.resize import ReducedAdapter, resize
from diffgraft.adapters.ops.singular_values import effective_rank
from diffgraft.bases import Base, load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.bases.weights import open_weights
from diffgraft.errors import DiffgraftError
from diffgraft.generation.merge_checkpoint import merge_checkpoint

SHAPES: dict[str, Shape] = {"unet.a": (20, 34), "unet.b": (22, 30, 3, 3), "unet.c": (24, 18, 1, 1)}


def filled(leaves: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Leaves of which none is zero."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(leaf.shape, generator=generator) for name, leaf in leaves.items()}


def made(kind: str, seed: int, rank: int = 3, alpha: float = 1.5) -> Adapter:
    """An adapter of one kind on three layers."""
    factors = {"lora": LowRank(), "tucker": LowRank(True), "loha": HadamardProduct(), "lokr": Kronecker()}[kind]
    deltas: dict[str, tuple[Delta, ...]] = {}
    for place, (path, shape) in enumerate(SHAPES.items()):
        start = factors.init_leaves(shape, rank, torch.Generator().manual_seed(0))
        deltas[path] = (FactorDelta(factors, filled(start, seed + place), alpha),)
    return Adapter(deltas, {"method": kind, "trigger": f"sks{seed}"})


def matrix(adapter: Adapter, path: str) -> np.ndarray[Any, Any]:
    """ΔW in float64, from the deltas' own."""
    total = np.zeros(SHAPES[path])
    for delta in adapter.deltas.get(path, ()):
        assert isinstance(delta, LinearDelta)
        total += delta.delta(SHAPES[path]).double().numpy()
    return total


def off(found: ReducedAdapter, wanted: dict[str, np.ndarray[Any, Any]]) -> float:
    return max(
        float(np.linalg.norm(matrix(found.adapter, path) - value) / np.linalg.norm(value))
        for path, value in wanted.items()
    )


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("lora", "tucker"), ("tucker", "loha"), ("loha", "lora", "lokr")])
def test_a_sum_is_the_sum(kinds: tuple[str, ...], tmp_path: Path) -> None:
    strengths = [0.7, -0.4, 1.3][: len(kinds)]
    adapters = [made(kind, 10 * place) for place, kind in enumerate(kinds)]
    given = [(str(place), adapter, s) for place, (adapter, s) in enumerate(zip(adapters, strengths, strict=True))]
    wanted = {
        path: sum(s * matrix(adapter, path) for adapter, s in zip(adapters, strengths, strict=True))
        for path in adapters[0].deltas
    }
    # the leaves of LoHa and LoKr do not tell the kernel of a convolution
    weights = _Shapes() if {"loha", "lokr"} & set(kinds) else None
    found = combine(given, weights=weights)  # type: ignore[arg-type]
    near = 0.001**0.5 if "lokr" in kinds else 2e-6
    assert off(found, wanted) < near  # type: ignore[arg-type]
    assert found.worst[1] < near
    if kinds == ("lora", "lora"):
        assert found.adapter.deltas["unet.a"][0].leaves["lora_down"].shape == (6, 34)
    again = load_adapter(found.adapter.save(tmp_path / "a.safetensors"))
    assert again.metadata["trigger"] == ", ".join(f"sks{10 * place}" for place in range(len(kinds)))
    smaller = combine(given, RankBudget(rank=2), weights=weights)  # type: ignore[arg-type]
    for path, value in wanted.items():
        flat = np.asarray(value).reshape(SHAPES[path][0], -1)
        s = np.linalg.svd(flat, compute_uv=False)
        best = np.sqrt((s[2:] ** 2).sum() / (s**2).sum())
        rest = np.linalg.norm(matrix(smaller.adapter, path) - value) / np.linalg.norm(value)
        assert rest == pytest.approx(best, rel=1e-3)
        assert smaller.errors[path] == pytest.approx(best, rel=1e-3)


class _Shapes(dict[str, Tensor]):
    """As `Weights`, of the shapes above."""

    def shapes(self) -> dict[str, Shape]:
        return SHAPES


def test_ties_and_dare_are_those_of_the_papers() -> None:
    generator = np.random.default_rng(4)
    changes = [generator.normal(size=(7, 11)) for _ in range(3)]
    density = 0.3
    kept = round(density * 77)
    trimmed = []
    for change in changes:
        least = np.sort(np.abs(change).ravel())[-kept]
        trimmed.append(np.where(np.abs(change) >= least, change, 0))
    sign = np.sign(sum(trimmed))
    wanted = np.zeros((7, 11))
    for row in range(7):
        for column in range(11):
            agreeing = [t[row, column] for t in trimmed if t[row, column] * sign[row, column] > 0]
            wanted[row, column] = np.mean(agreeing) if agreeing else 0
    found = ties([torch.from_numpy(change) for change in changes], density)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)

    ones = [torch.ones(300, 200), 2 * torch.ones(300, 200)]
    dropped = dare(ones, 0.25, torch.Generator().manual_seed(0))
    assert set(dropped.unique().tolist()) == {0.0, 4.0, 8.0, 12.0}
    assert dropped.mean() == pytest.approx(3.0, rel=0.03)


def test_combining_by_ties_goes_through_the_matrices() -> None:
    one, two = made("lora", 1), made("lora", 2)
    found = combine([("1", one, 0.5), ("2", two, 2.0)], RankBudget(energy=1.0), "ties", 0.5)
    wanted = {
        path: ties([torch.from_numpy(s * matrix(a, path)) for a, s in ((one, 0.5), (two, 2.0))], 0.5).numpy()
        for path in SHAPES
    }
    assert off(found, wanted) < 1e-5
    assert (
        off(combine([("1", one, 0.5)], RankBudget(energy=1.0), "dare", 1.0), {p: 0.5 * matrix(one, p) for p in SHAPES})
        < 1e-5
    )


def test_what_cannot_be_combined_is_refused() -> None:
    one = made("lora", 1)
    other = Adapter({"unet.a": (low_rank(torch.ones(2, 5), torch.ones(7, 2)),)})
    word = Adapter({}, {}, tokens={"<zorp>": {"text_encoder": torch.ones(1, 8)}})
    with pytest.raises(DiffgraftError, match="are for different bases"):
        combine([("1", one, 1.0), ("2", other, 1.0)])
    with pytest.raises(DiffgraftError, match="has the word '<zorp>', which an earlier"):
        combine([("1", word, 1.0), ("2", word, 1.0)])
    with pytest.raises(DiffgraftError, match="did you mean 'ties'"):
        combine([("1", one, 1.0)], algorithm="tie")
    with pytest.raises(DiffgraftError, match="Invalid value density=0"):
        combine([("1", one, 1.0)], algorithm="ties", density=0)
    with pytest.raises(DiffgraftError, match="does not tell the shape of"):
        combine([("1", made("lokr", 1), 1.0)])
    dora = Adapter({"unet.a": (DoraDelta(low_rank(torch.ones(2, 34), torch.ones(20, 2)), torch.ones(20)),)})
    with pytest.raises(DiffgraftError, match="depends on the base's weights"):
        combine([("1", dora, 1.0)])


@pytest.mark.parametrize("kind", ["lora", "tucker", "loha"])
def test_resizing_says_how_much_is_lost(kind: str) -> None:
    adapter = made(kind, 5, rank=4)
    weights: Any = _Shapes() if kind == "loha" else None
    for size in (RankBudget(rank=2), RankBudget(energy=0.7)):
        found = resize(adapter, size, weights)
        assert found.adapter.method == "locon"
        for path in adapter.deltas:
            whole = matrix(adapter, path)
            lost = np.linalg.norm(matrix(found.adapter, path) - whole) / np.linalg.norm(whole)
            assert lost == pytest.approx(found.errors[path], rel=1e-3)
            assert 0 < lost**2 <= (0.3 if size.energy else 1)


def test_biases_and_norms_are_left_away_by_name() -> None:
    full = Adapter(
        {
            "unet.a": (FullDelta({"diff": torch.randn(20, 34), "diff_b": torch.ones(20)}),),
            "unet.norm": (FullDelta({"diff": torch.ones(20)}),),
        }
    )
    found = resize(full, RankBudget(rank=3))
    assert found.dropped == ("unet.a.bias", "unet.norm")
    assert list(found.adapter.deltas) == ["unet.a"]
    for way in ("sum", "ties", "dare"):
        found = combine([("one", full, 0.5), ("two", full, 0.5)], RankBudget(rank=3), way)
        assert set(found.dropped) == {"unet.a.bias", "unet.norm"}
    with pytest.raises(DiffgraftError, match="nothing to resize"):
        resize(Adapter({}), RankBudget(rank=3))


def on_base(base: Base, layers: str = "all") -> Adapter:
    generator = torch.Generator().manual_seed(2)
    deltas = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if (module := getattr(base, part)) is None:
            continue
        for path in choose_layers(part, module, layers):
            out, width, *kernel = module.get_parameter(f"{path}.weight").shape
            down = 0.3 * torch.randn(2, width, *kernel, generator=generator)
            up = 0.3 * torch.randn(out, 2, *[1] * len(kernel), generator=generator)
            deltas[f"{part}.{path.removeprefix('text_model.')}"] = (low_rank(down, up),)
    return Adapter(deltas, {"method": "locon"})


@pytest.mark.parametrize("layout", ["folder", "file"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_what_was_merged_is_extracted_again(family: str, layout: str, folders: Path, tmp_path: Path) -> None:
    """A checkpoint in either layout against the folder: the very layers, each of rank two."""
    base = load_base(folders / family)
    adapter = on_base(base)
    tuned = merge_checkpoint(base, {adapter: 0.8}, tmp_path / ("tuned" + (".safetensors" if layout == "file" else "")))
    with open_weights(tuned) as of_tuned, open_weights(folders / family) as of_base:
        if layout == "file":
            assert set(of_tuned) == {name for name in of_base if not name.endswith("position_ids")}
        found = extract(of_tuned, of_base, RankBudget(energy=0.99999))
        smaller = extract(of_tuned, of_base, RankBudget(rank=1), "lora")
    assert set(found.adapter.deltas) == set(adapter.deltas)
    assert not found.dropped
    for path, (delta,) in adapter.deltas.items():
        (again,) = found.adapter.deltas[path]
        shape = (delta.leaves["lora_up"].shape[0], *delta.leaves["lora_down"].shape[1:])
        assert isinstance(delta, LinearDelta)
        assert isinstance(again, LinearDelta)
        assert again.leaves["lora_down"].shape[0] == min(2, *shape[:2])
        torch.testing.assert_close(again.delta(shape), 0.8 * delta.delta(shape), atol=2e-3, rtol=1e-2)
    assert all("conv1" not in path for path in smaller.adapter.deltas)
    assert any(name.endswith("conv1.weight") for name in smaller.dropped)


def test_checkpoints_that_cannot_be_compared_are_refused(folders: Path) -> None:
    with open_weights(folders / "sd1") as one, open_weights(folders / "sdxl") as two:
        with pytest.raises(DiffgraftError, match="they belong to different families"):
            extract(two, one, RankBudget(rank=1))
        with pytest.raises(DiffgraftError, match="do not differ"):
            extract(one, one, RankBudget(rank=1))
        with pytest.raises(DiffgraftError, match="did you mean 'locon'"):
            extract(one, two, RankBudget(rank=1), "lokon")
        with pytest.raises(DiffgraftError, match="set --rank"):
            extract(one, two, RankBudget(energy=0.9), "loha")
    with pytest.raises(DiffgraftError, match=r"The base .* was not found"):
        open_weights(folders / "none")
    with pytest.raises(DiffgraftError, match="has no weights of a base"):
        open_weights(folders)


def test_a_loha_fits_better_than_a_lora_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    wanted = torch.randn(30, 50, generator=generator) * torch.randn(30, 1, generator=generator)
    leaves = fit_loha(wanted, 4)
    left = float((HADAMARD.weight(leaves, (30, 50)) - wanted).norm() / wanted.norm())
    s = torch.linalg.svdvals(wanted)
    of_lora = float(s[4:].norm() / s.norm())
    assert left < 0.95 * of_lora
    known = filled(HadamardProduct().init_leaves((30, 50), 2, generator), 3)
    exact = HADAMARD.weight(known, (30, 50))
    refit = HADAMARD.weight(fit_loha(exact, 2), (30, 50))
    assert (refit - exact).norm() < 0.35 * exact.norm()


def test_differences_are_relative_to_what_is_done() -> None:
    one = made("lora", 3)
    (first,) = one.deltas["unet.a"]
    changed = {**one.deltas, "unet.a": (low_rank(first.leaves["lora_down"], 1.1 * first.leaves["lora_up"], 1.5),)}
    found = compare(one, Adapter(changed, {"method": "other"}))
    assert found.errors["unet.a"] == pytest.approx(0.1, rel=1e-4)
    assert found.errors["unet.b"] == 0
    assert found.worst[0] == "unet.a"
    assert found.metadata["method"] == ("lora", "other")
    assert not found.same
    assert compare(one, Adapter(one.deltas, one.metadata)).same
    lacking = compare(one, Adapter({"unet.a": one.deltas["unet.a"]}, one.metadata))
    assert lacking.only_first == ("unet.b", "unet.c")
    assert lacking.errors["unet.b"] == pytest.approx(1.0)


def test_figures_of_an_adapter() -> None:
    u, v = torch.linalg.qr(torch.randn(20, 3)).Q, torch.linalg.qr(torch.randn(34, 3)).Q
    even = low_rank(2 * v.T, u, 3.0)
    dead = low_rank(torch.randn(2, 30, 3, 3), torch.zeros(22, 2, 1, 1), 1.0)
    large = FullDelta({"diff": torch.full((24, 18), 7e4)})
    kron = FactorDelta(KRONECKER, filled(Kronecker().init_leaves((24, 18), 2, torch.Generator()), 0), 2.0)
    product = low_rank(torch.full((2, 34), 300.0), torch.full((20, 2), 300.0), 2.0)  # entries of 180,000
    spread = low_rank(torch.full((2, 34), 100.0), torch.full((20, 2), 100.0), 2.0)  # of 20,000, though ‖ΔW‖ is 5e5
    deltas = {"a": even, "b": dead, "c": large, "d": kron, "e": product, "f": spread}
    report = inspect(Adapter({f"unet.{name}": (delta,) for name, delta in deltas.items()}, {"method": "mixed"}))
    by_path = {module.path: module for module in report.modules}
    assert by_path["unet.a"].norm == pytest.approx(2 * 3**0.5, rel=1e-5)
    assert by_path["unet.a"].effective_rank == pytest.approx(3, rel=1e-5)
    assert (by_path["unet.a"].rank, by_path["unet.a"].alpha) == (3, 3.0)
    assert report.dead == ["unet.b"]
    assert report.overflows == ["unet.c", "unet.e"]
    assert report.fits == []
    assert effective_rank(torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(2)
    assert effective_rank(torch.zeros(3)) == 0


def test_adapters_of_two_bases_are_not_compared() -> None:
    one, two = ({"unet.a": (low_rank(torch.ones(2, width), torch.ones(7, 2)),)} for width in (5, 6))
    with pytest.raises(DiffgraftError, match=r"unet\.a differ, \[7, 5\] and \[7, 6\]"):
        compare(Adapter(one), Adapter(two))


def test_lohas_are_summed_exactly_where_their_ranks_are_more_than_the_sides() -> None:
    one, two = made("loha", 1, rank=4), made("loha", 2, rank=4)
    weights: Any = _Shapes()
    found = combine([("1", one, 1.0), ("2", two, 0.5)], weights=weights)
    assert off(found, {path: matrix(one, path) + 0.5 * matrix(two, path) for path in SHAPES}) < 2e-6
