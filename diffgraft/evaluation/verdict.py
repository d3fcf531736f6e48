"""The verdict on an adapter at a strength, the Pareto front, and the recommended one of several.

All figures are first brought to shares that mean the same for every base and encoder, with the base alone as one end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["too little", "good", "overcooked"]

LEAST_LIKENESS = 0.6
"""Share of the references' likeness below which an adapter has learned too little"""
LEAST_FOLLOWING = 0.5
"""Share of the base's prompt following below which the adapter of a subject is overcooked"""
LEAST_IN_STYLE = 0.2
"""The same for styles, in which encoders recognise less, and which change compositions"""
FULL_LIKENESS = 1.2
"""Share of likeness beyond which more is no gain: pictures then become copies of the references"""
TIE = 0.02
"""Difference of scores that is too small to prefer one"""
LEAST_DIVERSITY = 0.1
"""Share of the base's diversity below which an adapter is overcooked"""
MOST_DRIFT = 3.0
"""Movement of pictures of the class, in distances between seeds of the base, above which an adapter is overcooked"""
MOST_LEAK = 0.6
"""Share of the gained likeness that pictures of the class show too, above which an adapter is overcooked"""


@dataclass(frozen=True)
class Outcome:
    """What an adapter learned and what it kept, each as a share of the most or of the bare base."""

    likeness: float
    """Gain in likeness: 0 for the base alone, 1 for the references compared with one another"""
    following: float
    """Prompt following: 0 for pictures that do not depend on the prompt, 1 for the base alone"""
    diversity: float
    """Diversity of pictures of one prompt: 1 for the base alone; NaN with too few seeds"""
    drift: float
    """Movement of pictures of the class: 0 for the base alone, 1 where they are as far off as those of other seeds"""
    leak: float
    """Likeness that pictures of the class gain: 0 for none, 1 for as much as with the trigger"""
    is_subject: bool = True
    """Whether a subject was learned, not a style"""

    @property
    def score(self) -> float:
        """Harmonic mean of likeness, up to 1.2, and following, up to 1, less what leaks beyond the limit."""
        learned = min(FULL_LIKENESS, max(0.0, self.likeness))
        followed = 1.0 if math.isnan(self.following) else min(1.0, max(0.0, self.following))
        balanced = 2 * learned * followed / (learned + followed) if learned + followed else 0.0
        return balanced * (1 - min(1.0, self.leak - MOST_LEAK)) if self._leaks else balanced

    @property
    def verdict(self) -> Verdict:
        """Whether an adapter is overcooked, has learned too little, or is good."""
        if self._is_lost or self._is_uniform or self._drifts or self._leaks:
            return "overcooked"
        return "too little" if self.likeness < LEAST_LIKENESS else "good"

    @property
    def _is_lost(self) -> bool:
        return self.following < (LEAST_FOLLOWING if self.is_subject else LEAST_IN_STYLE)

    @property
    def _is_uniform(self) -> bool:
        return self.diversity < LEAST_DIVERSITY

    @property
    def _drifts(self) -> bool:
        return self.drift > MOST_DRIFT

    @property
    def _leaks(self) -> bool:
        """Whether pictures without the trigger show what was learned; a share of a small gain says nothing."""
        return self.likeness >= LEAST_LIKENESS and self.leak > MOST_LEAK

    @property
    def reason(self) -> str:
        """Why the verdict is as it is, in a few words."""
        if self._is_lost:
            return f"it follows prompts {_percent(self.following)} as well as the base alone"
        if self._is_uniform:
            return f"pictures of one prompt have {_percent(self.diversity)} of the base's diversity"
        if self._drifts:
            return f"it moves pictures of the class {self.drift:.1f} times as far as other seeds of the base are apart"
        if self._leaks:
            return f"pictures without the trigger show {_percent(self.leak)} of the likeness too"
        return f"it reaches {_percent(self.likeness)} of the likeness that your pictures have to one another"


def _percent(share: float) -> str:
    return f"{max(0.0, share):.0%}".replace("%", " %")


@dataclass(frozen=True)
class Choice:
    """The recommended adapter and strength."""

    index: int
    """Its place among those that were compared"""
    reason: str
    """Why, in a sentence"""


def recommend(names: Sequence[str], strengths: Sequence[float], shares: Sequence[Outcome]) -> Choice:
    """Choose the one with the best score among those that are good; among all if none is.

    Of those with nearly the best score, the one nearest to the strength 1, which adapters are trained at, is chosen.

    Args:
        names: name and strength of each, for the reason.
        strengths: strength of each.
        shares: shares of each.
    """
    places = range(len(shares))
    good = [place for place in places if shares[place].verdict == "good"]
    highest = max(shares[place].score for place in good or places)
    nearly = [place for place in good or places if shares[place].score >= highest - TIE]
    best = min(nearly, key=lambda place: (round(abs(strengths[place] - 1), 6), -shares[place].score))
    own = shares[best]
    facts = f"{names[best]} reaches {_percent(own.likeness)} of the likeness that your pictures have to one another"
    if not math.isnan(own.following):
        facts += f", and follows prompts {_percent(own.following)} as well as the base alone"
    if not good:
        return Choice(best, f"None is good; the best compromise: {facts}, but it is {own.verdict}, as {own.reason}.")
    if len(good) == 1:
        return Choice(best, f"{facts}; it is the only good one.")
    return Choice(best, f"{facts}: the best balance of the {len(good)} good ones.")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of the points that no other point exceeds in one coordinate without falling short in the other.

    They are ordered by the first coordinate. Of equal points the first is kept.
    """
    front: list[int] = []
    highest = -math.inf
    for place in sorted(range(len(points)), key=lambda place: (-points[place][0], -points[place][1], place)):
        if points[place][1] > highest:
            front.append(place)
            highest = points[place][1]
    return front[::-1]
