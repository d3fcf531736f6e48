"""Cases of the benchmark: combinations of target, method and seed, each of which is one training run."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.measure import measure, save_new
from benchmarks.learning.targets import made_up, of_photographs

METHODS = ("lora", "locon", "loha", "lokr", "full", "textual-inversion", "pivotal", "hypernetwork")
NO_PRIOR = "lora, without prior preservation"
BY_PREDICTION = "lora, prior preservation by prediction"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in METHODS},
    NO_PRIOR: ("lora", {"prior.weight": "0"}),
    BY_PREDICTION: ("lora", {"prior.by": "prediction"}),
}
"""Name in the table → method, and settings that override the recipe"""
CLASSES = {"red_cartoon": "cartoon"}
"""Name of a folder of photographs → class noun, if the name is not the noun"""


@dataclass(frozen=True)
class Case:
    """One training run: a target, a variant of a method (`VARIANTS`) and a seed."""

    target: str
    variant: str
    seed: int


def cases(seeds: int, photos: Path | None) -> Iterator[Case]:
    """Yield all cases: those of the first seed first, photographs last."""
    for seed in range(seeds):
        for target in ("poodle", "alien", "screen-print"):
            for variant in VARIANTS:
                if variant not in (NO_PRIOR, BY_PREDICTION) or target != "screen-print":
                    yield Case(target, variant, seed)
    for seed in range(seeds):
        for folder in sorted(photos.iterdir()) if photos else ():
            if folder.is_dir():
                yield Case(folder.name, "lora", seed)


def work(case: Case, photos: Path | None, pictures: Path) -> dict[str, Any]:
    """Return the record of one case: its fields and its figures; called in a separate process."""
    method, settings = VARIANTS[case.variant]
    known = made_up()
    if case.target in known:
        target = known[case.target]
    else:
        assert photos is not None
        target = of_photographs(photos / case.target, CLASSES.get(case.target, case.target))
    keep = pictures / case.target / case.variant if case.seed == 0 and target.new else None
    if keep is not None and not (before := keep.with_name("before")).exists():
        save_new(target, target.noun or "flat", before)
    return {**asdict(case), **measure(target, method, case.seed, settings, keep)}
