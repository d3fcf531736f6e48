"""Inspection of an adapter: figures of its modules, for people to read and, as JSON, for programs."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from diffgraft.adapters.adapter import Adapter, Delta, LinearDelta
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.factors import FactorDelta, Shape
from diffgraft.adapters.formats.header import FOREIGN
from diffgraft.adapters.methods.lokr import Kronecker
from diffgraft.adapters.ops.effect import fitting_bases, total_as_product
from diffgraft.adapters.ops.singular_values import effective_rank, squared_singular_values
from diffgraft.adapters.training_metadata import recipe_lines, tags, training_settings
from diffgraft.bases.shapes import layer_shapes
from diffgraft.progress import track
from diffgraft.terminal import printable

HALF = 65504.0
"""Largest number of float16"""

_BLOCK_SIZE = 2**24
"""Entries of ΔW that are computed at a time"""


@dataclass(frozen=True)
class ModuleFigures:
    """Figures of one delta of a module."""

    path: str
    """Path of the module"""
    kind: str
    """Kind of the delta"""
    rank: int | None
    """Inner dimension of its factors; None if it has none"""
    alpha: float | None
    """Alpha; None if the delta has no scale"""
    norm: float | None
    """‖ΔW‖; None if it depends on the base's weights"""
    effective_rank: float | None
    """exp of the entropy of the squared singular values, as shares of their sum (Roy and Vetterli 2007)"""
    largest: float
    """Largest absolute value in its leaves; float16 cannot hold values beyond 65504"""

    @property
    def is_dead(self) -> bool:
        """Whether the delta does nothing."""
        return self.norm == 0


@dataclass(frozen=True)
class AdapterReport:
    """Contents and figures of an adapter."""

    method: str
    """Name of the method that trained the adapter"""
    family: str | None
    """Family of the base in the header, or of the bases that the adapter fits"""
    fits: list[str]
    """Known bases that the adapter fits; only computed if the file does not tell the family or all shapes"""
    metadata: Mapping[str, Any]
    """Metadata from the header"""
    training: Mapping[str, str]
    """Settings of the training run, from headers of other tools"""
    modules: list[ModuleFigures]
    """Figures of each delta"""
    networks: list[str]
    """Kind and parts of each network"""
    words: Mapping[str, Mapping[str, Sequence[int]]]
    """Word → text encoder → number and width of its embeddings"""
    strengths: str
    """Tools that define what strengths other than 1 mean for the adapter; empty if tools agree"""
    schedule: str = ""
    """How many ranks of a T-LoRA act at which timesteps; empty if all of them always do"""
    tags: Sequence[tuple[str, int]] = ()
    """Tags of the captions that the adapter was trained with, and their counts, from headers of other tools"""
    dead: list[str] = field(default_factory=list)
    """Paths of the modules with a ΔW of zero"""
    overflows: list[str] = field(default_factory=list)
    """Paths of the modules with values, in leaves or in ΔW, that float16 cannot hold"""

    def __str__(self) -> str:
        return "\n".join(map(printable, summary(self)))

    def as_json(self) -> dict[str, Any]:
        """The report as JSON types; NaN and infinite numbers become null."""
        report: dict[str, Any] = _in_json(asdict(self))
        return report


def _in_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _in_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def inspect(adapter: Adapter, device: str = "cpu") -> AdapterReport:
    """Compute figures of every module on `device`, and collect the contents of the header."""
    base = adapter.metadata.get("base")
    family = base.get("family") if isinstance(base, Mapping) else None
    # computing the shapes of all known bases takes seconds, so it is done only if the file leaves something open
    is_open = family is None or any(delta.weight_shape is None for own in adapter.deltas.values() for delta in own)
    fits = fitting_bases(adapter.deltas) if adapter.deltas and is_open else []
    base_shapes = layer_shapes(fits[0]) if fits else {}
    modules: list[ModuleFigures] = []
    overflows: list[str] = []
    for path, deltas in track(adapter.deltas.items(), "modules", min_items=20):
        for delta in deltas:
            module, largest_entry = _module(path, delta, delta.weight_shape or base_shapes.get(path), device)
            modules.append(module)
            if not max(module.largest, largest_entry) <= HALF:
                overflows.append(path)
    foreign = adapter.metadata.get(FOREIGN) or {}
    conventions = {
        delta.strength_convention for deltas in adapter.deltas.values() for delta in deltas if delta.strength_convention
    }
    return AdapterReport(
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
        strengths=", ".join(sorted(conventions)),
        schedule=_schedule(adapter),
        tags=tags(foreign),
        dead=[module.path for module in modules if module.is_dead],
        overflows=overflows,
    )


def _schedule(adapter: Adapter) -> str:
    """Tell the ranks of an adapter's largest T-LoRA at the first, the middle and the last timestep; empty without."""
    timed = [
        (delta.rank, delta.rank_schedule)
        for deltas in adapter.deltas.values()
        for delta in deltas
        if isinstance(delta, FactorDelta) and delta.rank_schedule is not None
    ]
    if not timed:
        return ""
    rank, schedule = max(timed, key=lambda item: item[0])
    last = schedule.timesteps - 1
    ranks = [f"{schedule.active(rank, at)} ranks at {at}" for at in (0, last // 2, last)]
    start = ", each with its start" if schedule.has_start else ""
    return f"{', '.join(ranks)}{start}"


def _module(path: str, delta: Delta, shape: Shape | None, device: str) -> tuple[ModuleFigures, float]:
    """Figures of a delta, and the largest entry of ΔW, or an upper bound of it that float16 can hold."""
    factors = delta.direction if isinstance(delta, DoraDelta) else delta
    rank = factors.rank if isinstance(factors, FactorDelta) else None
    largest = max(float(leaf.abs().max()) for leaf in delta.leaves.values() if leaf.numel())
    norm = effective = None
    largest_entry = 0.0
    if isinstance(delta, LinearDelta) and shape is not None:
        squares = squared_singular_values(path, [(delta, 1.0)], shape, None, device)
        norm = float(squares.sum().clamp_min(0).sqrt())
        effective = effective_rank(squares)
        largest_entry = norm  # no entry is larger than the norm; the matrix itself is only needed for large norms
        if norm > HALF:
            largest_entry = _largest_entry(delta, shape)
    return ModuleFigures(path, delta.kind, rank, delta.alpha, norm, effective, largest), largest_entry


def _largest_entry(delta: LinearDelta, shape: Shape) -> float:
    """Largest absolute entry of ΔW; of a product, some rows are computed at a time, and never the whole matrix."""
    product = total_as_product([(delta, 1.0)], shape)
    if isinstance(delta, FactorDelta) and isinstance(delta.factors, Kronecker):
        leaves = {name: leaf.double() for name, leaf in delta.leaves.items()}
        w1, w2 = (factor.abs().max() for factor in delta.factors.kronecker_factors(leaves, shape))
        return abs(delta.scale) * float(w1 * w2)  # each entry is the product of an entry of w1 and one of w2
    if product is None:
        return float(delta.delta(shape).abs().max())
    up, down = product
    return max(float((rows @ down).abs().max()) for rows in torch.split(up, max(1, _BLOCK_SIZE // down.shape[1])))


def summary(report: AdapterReport) -> list[str]:
    """The report as lines of text."""
    metadata = report.metadata
    base: Any = metadata.get("base")
    base = base if isinstance(base, Mapping) else {}
    lines = [f"method   {report.method}"]
    keys = ("rank", "alpha", "trigger", "class", "seed")
    lines += [f"{key:8} {metadata[key]}" for key in keys if metadata.get(key, "") != ""]
    details = [report.family or "family unknown", str(base.get("hash", ""))[:12]]
    lines.append(f"base     {base.get('name', '–')} ({', '.join(word for word in details if word)})")
    recipe = metadata.get("recipe")
    if isinstance(recipe, Mapping):
        lines += recipe_lines(recipe)
    if report.fits and not base:
        lines.append(f"fits     {', '.join(report.fits)}")
    if report.modules:
        lines += _module_lines(report)
    lines += [f"network  {network}" for network in report.networks]
    for word, vectors in report.words.items():
        shapes = ", ".join(f"{count} × {width} in {part}" for part, (count, width) in vectors.items())
        lines.append(f"word     {word}: {shapes}")
    if report.strengths:
        lines.append(f"strength other than 1: as defined by {report.strengths}, where tools differ")
    if report.dead:
        lines.append(f"dead     {len(report.dead)} modules do nothing (e.g. {report.dead[0]})")
    if report.overflows:
        lines.append(f"overflow {len(report.overflows)} modules are too large for float16 (e.g. {report.overflows[0]})")
    lines += [f"{key:8} {value}" for key, value in report.training.items()]
    if report.tags:
        lines.append(f"tags     {', '.join(f'{tag} ({count})' for tag, count in report.tags[:12])}")
    return lines


def _module_lines(report: AdapterReport) -> list[str]:
    """Lines of the summary on the adapter's modules."""
    lines = []
    # a module with several deltas has several figures, but counts once here
    parts = Counter(path.partition(".")[0] for path in dict.fromkeys(module.path for module in report.modules))
    kinds = Counter(module.kind for module in report.modules)
    lines.append(f"modules  {', '.join(f'{count} in {part}' for part, count in parts.items())}")
    lines.append(f"kinds    {', '.join(f'{kind} × {count}' for kind, count in kinds.items())}")
    if report.schedule:
        lines.append(f"by timestep {report.schedule}")
    for name, values in (
        ("ranks", Counter(module.rank for module in report.modules if module.rank is not None)),
        ("alphas", Counter(module.alpha for module in report.modules if module.alpha is not None)),
    ):
        if values:
            lines.append(f"{name:8} {', '.join(f'{value:g} × {count}' for value, count in sorted(values.items()))}")
    norms = sorted((module.norm, module.path) for module in report.modules if module.norm is not None)
    if norms:
        median = norms[len(norms) // 2][0]
        lines.append(f"norms    {norms[0][0]:.3g} to {norms[-1][0]:.3g} ({norms[-1][1]}), median {median:.3g}")
    ranks = sorted(module.effective_rank for module in report.modules if module.effective_rank)
    if ranks:
        lines.append(f"effective ranks {ranks[0]:.1f} to {ranks[-1]:.1f}, median {ranks[len(ranks) // 2]:.1f}")
    return lines
