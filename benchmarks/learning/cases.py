"""Cases of the benchmark: combinations of target, method and seed, each of which is one training run."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.measure import measure, save_new
from benchmarks.learning.targets import made_up, of_held_back, of_photographs
from diffgraft.bases.tiny.world.glyphs import HELD_BACK_FOR_TESTS

METHODS = (
    "lora",
    "tlora",
    "locon",
    "loha",
    "lokr",
    "full",
    "textual-inversion",
    "pivotal",
    "hypernetwork",
    "oft",
    "boft",
    "glora",
    "ia3",
    "custom",
)
NO_PRIOR = "lora, without prior preservation"
BY_PICTURES = "lora, prior preservation by class pictures"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in METHODS},
    NO_PRIOR: ("lora", {"prior.weight": "0"}),
    BY_PICTURES: ("lora", {"prior.by": "pictures", "prior.weight": "2"}),
}
"""Name in the table → method, and settings that override the recipe"""
BEST = "full"
"""The method that learns subjects best, which is trained on the unseen subjects beside `lora`"""
UNSEEN = tuple(HELD_BACK_FOR_TESTS)
"""Subjects on which no setting was tuned"""
CLASSES = {"red_cartoon": "cartoon"}
"""Name of a folder of photographs → class noun, if the name is not the noun"""


@dataclass(frozen=True)
class Case:
    """One training run: a target, a variant of a method (`VARIANTS`) and a seed."""

    target: str
    variant: str
    seed: int


def cases(seeds: int, photos: Path | None) -> Iterator[Case]:
    """Yield all cases, those first that the page needs most."""
    for seed in range(seeds):
        yield from (Case(name, "lora", seed) for name in UNSEEN)
    for name in ("alien", "screen-print"):
        yield from (Case(name, variant, 0) for variant in VARIANTS if name == "alien" or variant in METHODS)
        yield from (Case(name, "lora", seed) for seed in range(1, seeds))
    folders = sorted(photos.iterdir()) if photos else ()
    yield from (Case(folder.name, "lora", 0) for folder in folders if folder.is_dir())
    yield from (Case(name, BEST, 0) for name in UNSEEN)


def work(case: Case, photos: Path | None, pictures: Path) -> dict[str, Any]:
    """Return the record of one case: its fields and its figures; called in a separate process."""
    method, settings = VARIANTS[case.variant]
    if case.target in UNSEEN:
        target = of_held_back(case.target)
    elif case.target in (known := made_up()):
        target = known[case.target]
    else:
        assert photos is not None
        target = of_photographs(photos / case.target, CLASSES.get(case.target, case.target))
    keep = pictures / case.target / case.variant if case.seed == 0 and target.new else None
    if keep is not None and not (before := keep.with_name("before")).exists():
        save_new(target, target.noun or "flat", before)
    return {**asdict(case), **measure(target, method, case.seed, settings, keep)}
