"""Scoring: figures of all measures for drawn pictures, and the shares that the verdict is made of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diffgraft.evaluation.evidence import Drawings, Estimator, Evidence, Figure, Reference, figure
from diffgraft.evaluation.measure import Measure
from diffgraft.evaluation.measures.diversity import mean_distance
from diffgraft.evaluation.verdict import Outcome

_PREFERRED = {True: ("patches", "dino", "clip-i"), False: ("clip-i", "dino", "patches")}
"""Whether a subject was learned → measures of likeness, those first that tell it best"""

_LEAST_WAY = 0.05
"""Least way from the base's likeness to that of the references, as a share of the way to identical pictures"""


@dataclass(frozen=True)
class Scores:
    """Measures of an adapter at one strength, and what they say of it."""

    figures: Mapping[str, Figure]
    """Measure → figure"""
    shares: Outcome


class Scorer:
    """Scores the pictures of adapters by measures, with those of the base alone as zero line."""

    def __init__(self, measures: Sequence[Measure], bare: Evidence, *, is_subject: bool) -> None:
        """Prepare what is the same for all adapters.

        Args:
            measures: measures, of which one tells the likeness.
            bare: evidence of the base alone.
            is_subject: whether a subject was learned, not a style.
        """
        self.measures, self._is_subject = measures, is_subject
        self._seeds = bare.drawn.seeds
        self._estimators = {measure.name: measure.estimator(bare) for measure in measures}
        self.likeness = _first(_PREFERRED[is_subject], measures, "likeness")
        """Measure of likeness that the verdict goes by"""
        self.following = _first([], measures, "following")
        self.ceiling = ceiling(self.likeness, bare)
        """Likeness of the references to one another"""
        self._class_likeness = self._value(_of_class(self.likeness, bare))
        self._class_distance = self._value(mean_distance(bare, bare.drawn.of_class))

    def bare_figures(self) -> dict[str, Figure]:
        """Return the measures of the base alone, the zero line of a comparison."""
        return {name: figure(own, own, self._seeds) for name, own in self._estimators.items()}

    def score(self, evidence: Evidence) -> Scores:
        """Return the figures of an adapter, and its shares."""
        own = {measure.name: measure.estimator(evidence) for measure in self.measures}
        figures = {name: figure(own[name], self._estimators[name], self._seeds) for name in own}
        return Scores(figures, self._shares(evidence, figures))

    def _shares(self, evidence: Evidence, figures: Mapping[str, Figure]) -> Outcome:
        likeness = figures[self.likeness.name]
        leaked = self._value(_of_class(self.likeness, evidence)) - self._class_likeness
        return Outcome(
            likeness=likeness.gain / self._way(likeness.value - likeness.gain),
            following=self._following(figures),
            diversity=self._kept(figures, "diversity"),
            drift=_ratio(self._by_role(figures, "drift").value, self._class_distance),
            leak=_ratio(leaked, likeness.gain),
            is_subject=self._is_subject,
        )

    def _way(self, bare: float) -> float:
        """Return how far it is from the likeness of the base alone to that of the references to one another.

        References that resemble one another hardly more than the base's pictures do, as they show different things,
        tell no way: it is then half of that to identical pictures.
        """
        way, whole = self.ceiling - bare, 1 - bare
        return way if way > _LEAST_WAY * whole else max(whole, _LEAST_WAY) / 2

    def _following(self, figures: Mapping[str, Figure]) -> float:
        """Return the share of prompt following that is left.

        Encoders may be unable to recognise things in a new style, but a style should keep the base's composition: for
        styles it is the mean of both shares.
        """
        followed, composed = self._kept(figures, "following"), self._kept(figures, "composition")
        return followed if self._is_subject or math.isnan(composed) else (followed + composed) / 2

    def _kept(self, figures: Mapping[str, Figure], role: str) -> float:
        """Return the share of the base's value that is left."""
        found = self._by_role(figures, role)
        return _ratio(found.value, found.value - found.gain)

    def _by_role(self, figures: Mapping[str, Figure], role: str) -> Figure:
        found = next((figures[measure.name] for measure in self.measures if measure.role == role), None)
        return found or Figure(math.nan, math.nan, math.nan, math.nan)

    def _value(self, estimator: Estimator) -> float:
        return estimator(range(self._seeds))


def ceiling(likeness: Measure, bare: Evidence) -> float:
    """Return the mean likeness of each reference to all others; 1 with a single reference."""
    references = bare.references
    if len(references) < 2:
        return 1.0
    total = 0.0
    for place, reference in enumerate(references):
        rows = [[reference.image]]
        others: list[Reference] = [*references[:place], *references[place + 1 :]]
        total += likeness.estimator(replace(bare, drawn=Drawings(rows, rows), references=others))([0])
    return total / len(references)


def _of_class(likeness: Measure, evidence: Evidence) -> Estimator:
    """Return the likeness of pictures of the class, without the trigger."""
    rows = evidence.drawn.of_class
    return likeness.estimator(replace(evidence, drawn=Drawings(rows, rows)))


def _first(preferred: Sequence[str], measures: Sequence[Measure], role: str) -> Measure:
    """Return the measure of a role that is preferred."""
    by_name = {measure.name: measure for measure in measures if measure.role == role}
    return next((by_name[name] for name in preferred if name in by_name), next(iter(by_name.values())))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
