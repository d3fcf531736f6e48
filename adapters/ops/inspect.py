"""What an adapter file holds, in figures: for people to read and, as JSON, for programs."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta, LinearDelta
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.factors import FactorDelta, Shape
from diffgraft.adapters.formats.header import FOREIGN
from diffgraft.adapters.methods.lokr import Kronecker
from diffgraft.adapters.ops.effect import as_matrix, as_product, fitting
from diffgraft.adapters.training_metadata import tags, training_settings
from diffgraft.bases.shapes import layer_shapes
from diffgraft.progress import track
from diffgraft.terminal import printable

HALF = 65504.0
"""The largest number of float16."""

_AT_ONCE = 2**24
"""Entries of ΔW that are formed at a time"""


@dataclass(frozen=True)
class Module:
    """One module that is changed."""

    path: str
    kind: str
    rank: int | None
    alpha: float | None
    norm: float | None
    """‖ΔW‖; None where it depends on the base's weights"""
    effective_rank: float | None
    """exp of the entropy of the squared singular values, as shares of their sum (Roy and Vetterli 2007)"""
    largest: float
    """Of all numbers in its leaves; beyond 65504 float16 cannot hold it"""

    @property
    def is_dead(self) -> bool:
        """Whether it does nothing."""
        return self.norm == 0


@dataclass(frozen=True)
class Report:
    """All of it."""

    method: str
    family: str | None
    """That of the header, else of the bases whose layers it fits"""
    fits: list[str]
    """Known bases whose layers it fits; looked for where the file leaves family or shapes open"""
    metadata: Mapping[str, Any]
    training: Mapping[str, str]
    """Settings of the training run, from headers of other tools"""
    modules: list[Module]
    networks: list[str]
    words: Mapping[str, Mapping[str, Sequence[int]]]
    """Word → text encoder → number and width of its vectors"""
    strengths: str
    """Whose way of strengths other than 1 it follows, where tools differ; empty where they do not"""
    tags: Sequence[tuple[str, int]] = ()
    """Tags of the captions it was trained with, and how often each stood there, from headers of other tools"""
    dead: list[str] = field(default_factory=list)
    overflows: list[str] = field(default_factory=list)
    """Modules with numbers that float16 cannot hold, or whose ΔW has such"""

    def __str__(self) -> str:
        return "\n".join(map(printable, summary(self)))

    def as_json(self) -> dict[str, Any]:
        """In JSON's types; numbers that are none, or beyond all bounds, are null."""
        found: dict[str, Any] = _in_json(asdict(self))
        return found


def _in_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _in_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def inspect(adapter: Adapter, device: str = "cpu") -> Report:
    """Figures of every module, computed on `device`, and what the header says."""
    said = adapter.metadata.get("base")
    family = said.get("family") if isinstance(said, Mapping) else None
    # the known bases take seconds to lay out: only where the file leaves something open
    is_open = family is None or any(delta.weight_shape is None for own in adapter.deltas.values() for delta in own)
    fits = fitting(adapter.deltas) if adapter.deltas and is_open else []
    there = layer_shapes(fits[0]) if fits else {}
    modules: list[Module] = []
    overflows: list[str] = []
    for path, deltas in track(adapter.deltas.items(), "modules", min_items=20):
        for delta in deltas:
            module, most = _module(path, delta, delta.weight_shape or there.get(path), device)
            modules.append(module)
            if not max(module.largest, most) <= HALF:
                overflows.append(path)
    foreign = adapter.metadata.get(FOREIGN) or {}
    follow = {delta.follows for deltas in adapter.deltas.values() for delta in deltas if delta.follows}
    return Report(
        method=adapter.method,
        family=family or (fits[0] if fits else None),
        fits=fits,
        metadata={key: value for key, value in adapter.metadata.items() if key != FOREIGN},
        training=training_settings(foreign),
        modules=modules,
        networks=[
            f"{n.kind}: {', '.join(dict.fromkeys(k.split('.')[0] for k in n.tensors))}" for n in adapter.networks
        ],
        words={word: {part: [*rows.shape] for part, rows in own.items()} for word, own in adapter.tokens.items()},
        strengths=", ".join(sorted(follow)),
        tags=tags(foreign),
        dead=[module.path for module in modules if module.is_dead],
        overflows=overflows,
    )


def _module(path: str, delta: Delta, shape: Shape | None, device: str) -> tuple[Module, float]:
    """Its figures, and the largest entry of ΔW as far as it is formed."""
    factors = delta.direction if isinstance(delta, DoraDelta) else delta
    rank = factors.rank if isinstance(factors, FactorDelta) else None
    largest = max(float(leaf.abs().max()) for leaf in delta.leaves.values() if leaf.numel())
    norm = effective = None
    most = 0.0
    if isinstance(delta, LinearDelta) and shape is not None:
        squares = _squares(path, delta, shape, device)
        norm = float(squares.sum().clamp_min(0).sqrt())
        effective = effective_rank(squares)
        most = norm  # no entry is larger than that; only where it could matter is the matrix itself looked at
        if norm > HALF:
            most = _largest_entry(delta, shape)
    return Module(path, delta.kind, rank, delta.alpha, norm, effective, largest), most


def _squares(path: str, delta: LinearDelta, shape: Shape, device: str) -> Tensor:
    """Squared singular values of ΔW; of a vector its squared norm."""
    if len(shape) < 2:
        of_vector: Tensor = delta.delta(shape).double().square().sum()[None]
        return of_vector
    product = as_product([(delta, 1.0)], shape)
    if product is not None:
        up, down = (factor.to(device).double() for factor in product)
        core = torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T
        found: Tensor = torch.linalg.svdvals(core).square() if core.isfinite().all() else _beyond(core)
        return found
    if isinstance(delta, FactorDelta) and isinstance(delta.factors, Kronecker):
        # the singular values of w1 ⊗ w2 are all products of theirs
        one, two = delta.factors.pair({name: leaf.to(device).double() for name, leaf in delta.leaves.items()}, shape)
        if not (one.isfinite().all() and two.isfinite().all()):
            return _beyond(one)
        products = torch.outer(torch.linalg.svdvals(one).square(), torch.linalg.svdvals(two.flatten(1)).square())
        return products.flatten() * delta.scale**2
    matrix = as_matrix(path, [(delta, 1.0)], shape, None, device).flatten(1).double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    if not gram.isfinite().all():
        return _beyond(gram)
    squares: Tensor = torch.linalg.eigvalsh(gram).clamp_min(0)
    return squares


def _beyond(matrix: Tensor) -> Tensor:
    """What is told of a ΔW that is larger than any number: one singular value without bounds."""
    return torch.full((1,), float("inf"), dtype=matrix.dtype)


def _largest_entry(delta: LinearDelta, shape: Shape) -> float:
    """The largest entry of ΔW; of a product it is looked for in some rows at a time, and never formed as a whole."""
    product = as_product([(delta, 1.0)], shape)
    if isinstance(delta, FactorDelta) and isinstance(delta.factors, Kronecker):
        leaves = {name: leaf.double() for name, leaf in delta.leaves.items()}
        one, two = (factor.abs().max() for factor in delta.factors.pair(leaves, shape))
        return abs(delta.scale) * float(one * two)  # every entry is a product of one of each
    if product is None:
        return float(delta.delta(shape).abs().max())
    up, down = product
    return max(float((rows @ down).abs().max()) for rows in torch.split(up, max(1, _AT_ONCE // down.shape[1])))


def effective_rank(squares: Tensor) -> float:
    """exp(−Σ p log p) of p = squares / Σ squares; 0 where all are 0."""
    total = squares.sum()
    if total <= 0:
        return 0.0
    if not total.isfinite():
        return float("nan")
    shares = squares / total
    return float(torch.special.entr(shares).sum().exp())


def summary(report: Report) -> list[str]:
    """Lines for a person."""
    said = report.metadata
    base: Any = said.get("base")
    base = base if isinstance(base, Mapping) else {}
    lines = [f"method   {report.method}"]
    lines += [
        f"{key:8} {said[key]}" for key in ("rank", "alpha", "trigger", "class", "seed") if said.get(key, "") != ""
    ]
    known = [report.family or "family unknown", str(base.get("hash", ""))[:12]]
    lines.append(f"base     {base.get('name', '–')} ({', '.join(word for word in known if word)})")
    recipe = said.get("recipe")
    if isinstance(recipe, Mapping):
        lines.append(f"recipe   {', '.join(f'{key}={value}' for key, value in recipe.items())}")
    if report.fits and not base:
        lines.append(f"fits     {', '.join(report.fits)}")
    if report.modules:
        lines += _of_modules(report)
    lines += [f"network  {network}" for network in report.networks]
    for word, vectors in report.words.items():
        shapes = ", ".join(f"{count} × {width} in {part}" for part, (count, width) in vectors.items())
        lines.append(f"word     {word}: {shapes}")
    if report.strengths:
        lines.append(f"strength other than 1: as {report.strengths} has it, where tools differ")
    if report.dead:
        lines.append(f"dead     {len(report.dead)} modules do nothing, such as {report.dead[0]}")
    if report.overflows:
        lines.append(
            f"overflow {len(report.overflows)} modules are too large for float16, such as {report.overflows[0]}"
        )
    lines += [f"{key:8} {value}" for key, value in report.training.items()]
    if report.tags:
        lines.append(f"tags     {', '.join(f'{tag} ({count})' for tag, count in report.tags[:12])}")
    return lines


def _of_modules(report: Report) -> list[str]:
    lines = []
    # a module may be changed by several deltas, which are a figure each
    parts = Counter(path.partition(".")[0] for path in dict.fromkeys(module.path for module in report.modules))
    kinds = Counter(module.kind for module in report.modules)
    lines.append(f"modules  {', '.join(f'{count} in {part}' for part, count in parts.items())}")
    lines.append(f"kinds    {', '.join(f'{kind} × {count}' for kind, count in kinds.items())}")
    for name, values in (
        ("ranks", Counter(module.rank for module in report.modules if module.rank is not None)),
        ("alphas", Counter(module.alpha for module in report.modules if module.alpha is not None)),
    ):
        if values:
            lines.append(f"{name:8} {', '.join(f'{value:g} × {count}' for value, count in sorted(values.items()))}")
    norms = sorted((module.norm, module.path) for module in report.modules if module.norm is not None)
    if norms:
        median = norms[len(norms) // 2][0]
        lines.append(f"norms    {norms[0][0]:.3g} to {norms[-1][0]:.3g} ({norms[-1][1]}), in the middle {median:.3g}")
    found = sorted(module.effective_rank for module in report.modules if module.effective_rank)
    if found:
        lines.append(f"effective ranks {found[0]:.1f} to {found[-1]:.1f}, in the middle {found[len(found) // 2]:.1f}")
    return lines
