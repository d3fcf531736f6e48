"""Schedules: the noise levels of the steps, from the largest to 0.

Those of k-diffusion and webui (``modules/sd_schedulers.py``), by webui's names. A schedule is computed in float64.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffgraft.errors import DiffgraftError, did_you_mean

_TABLES: Mapping[str, Mapping[bool, Sequence[float]]] = {
    "align your steps": {
        False: (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
        True: (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    },
    "align your steps gits": {
        False: (14.615, 4.617, 2.507, 1.236, 0.702, 0.402, 0.240, 0.156, 0.104, 0.094, 0.029),
        True: (14.615, 4.734, 2.567, 1.529, 0.987, 0.652, 0.418, 0.268, 0.179, 0.127, 0.029),
    },
}
"""Schedule → whether for Stable Diffusion XL → noise levels of ten steps (Sabour et al. 2024, arXiv:2404.14507)"""


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels that a base was trained with."""

    sigmas: np.ndarray
    """σ of every timestep in the convention x₀ + σ · ε, from the smallest, float64 [timesteps]"""
    is_xl: bool = False
    """Whether the base is of the family of Stable Diffusion XL, for which some tables differ"""

    @property
    def smallest(self) -> float:
        """Smallest noise level."""
        return float(self.sigmas[0])

    @property
    def largest(self) -> float:
        """Largest noise level."""
        return float(self.sigmas[-1])

    def sigma(self, timestep: float) -> float:
        """Return σ at a timestep; between two it is interpolated by its logarithm."""
        return math.exp(float(np.interp(timestep, np.arange(len(self.sigmas)), np.log(self.sigmas))))

    def timestep(self, sigma: float) -> float:
        """Return the timestep at σ, as a fraction between two timesteps."""
        return float(np.interp(math.log(sigma), np.log(self.sigmas), np.arange(len(self.sigmas))))


def karras(steps: int, least: float, most: float, rho: float = 7.0) -> list[float]:
    """Even steps of σ^(1/ρ) (Karras et al. 2022, equation 5)."""
    ramp = np.linspace(0, 1, steps)
    low, high = least ** (1 / rho), most ** (1 / rho)
    return [*((high + ramp * (low - high)) ** rho).tolist(), 0.0]


def _uniform(steps: int, levels: NoiseLevels) -> list[float]:
    return [*(levels.sigma(time) for time in np.linspace(len(levels.sigmas) - 1, 0, steps)), 0.0]


def _sgm_uniform(steps: int, levels: NoiseLevels) -> list[float]:
    return [*(levels.sigma(time) for time in np.linspace(len(levels.sigmas) - 1, 0, steps + 1)[:-1]), 0.0]


def _exponential(steps: int, levels: NoiseLevels) -> list[float]:
    return [*np.exp(np.linspace(math.log(levels.largest), math.log(levels.smallest), steps)).tolist(), 0.0]


def _simple(steps: int, levels: NoiseLevels) -> list[float]:
    stride = len(levels.sigmas) / steps
    return [*(float(levels.sigmas[-1 - int(step * stride)]) for step in range(steps)), 0.0]


def _ddim(steps: int, levels: NoiseLevels) -> list[float]:
    return [*levels.sigmas[1 :: max(1, len(levels.sigmas) // steps)][::-1].tolist(), 0.0]


def _beta(steps: int, levels: NoiseLevels) -> list[float]:
    """Quantiles of a beta distribution (Lee et al. 2024, arXiv:2407.12173), with webui's α = β = 0.6."""
    alpha = 0.6
    # x = sin²θ has the density (sin θ · cos θ)^(2α − 1), which is finite; its ends, where it is steep, get more nodes
    nodes = np.linspace(0, 1, 2**14 + 1)
    angles = np.pi / 2 * (3 * nodes**2 - 2 * nodes**3)
    density = (np.sin(angles) * np.cos(angles)) ** (2 * alpha - 1) * nodes * (1 - nodes)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    shares = np.sin(np.interp(1 - np.linspace(0, 1, steps), below / below[-1], angles)) ** 2
    return [*(levels.smallest + shares * (levels.largest - levels.smallest)).tolist(), 0.0]


def _kl_optimal(steps: int, levels: NoiseLevels) -> list[float]:
    """Sabour et al. 2024, arXiv:2404.14507, appendix; its last noise level is the smallest, not 0."""
    shares = np.arange(steps + 1) / steps
    return [*np.tan(shares * math.atan(levels.smallest) + (1 - shares) * math.atan(levels.largest)).tolist()]


def _turbo(steps: int, levels: NoiseLevels) -> list[float]:
    count = len(levels.sigmas)
    times = np.clip(np.round(np.arange(steps, 0, -1) * count / steps - 1), 0, count - 1).astype(int)
    return [*levels.sigmas[times].tolist(), 0.0]


def _from_table(name: str) -> "Schedule":
    def schedule(steps: int, levels: NoiseLevels) -> list[float]:
        table = _TABLES[name][levels.is_xl]
        if steps == len(table):
            return [*table, 0.0]
        places = np.linspace(0, 1, len(table))
        logs = np.interp(np.linspace(0, 1, steps), places, np.log(table[::-1]))
        return [*np.exp(logs)[::-1].tolist(), 0.0]

    return schedule


Schedule = Callable[[int, NoiseLevels], list[float]]
"""(number of steps, noise levels of the base) → σ before each step, and σ after the last"""
SCHEDULES: Mapping[str, Schedule] = {
    "uniform": _uniform,
    "karras": lambda steps, levels: karras(steps, levels.smallest, levels.largest),
    "exponential": _exponential,
    "polyexponential": _exponential,
    "sgm uniform": _sgm_uniform,
    "simple": _simple,
    "normal": _uniform,
    "ddim": _ddim,
    "beta": _beta,
    "kl optimal": _kl_optimal,
    "turbo": _turbo,
    **{name: _from_table(name) for name in _TABLES},
}
"""Name → schedule; `polyexponential` with webui's exponent 1 is `exponential`, and `normal` is `uniform`"""


def schedule_sigmas(name: str, steps: int, levels: NoiseLevels) -> list[float]:
    """Return the noise levels of a schedule, `steps` + 1 of them in most schedules, from the largest.

    Raises:
        DiffgraftError: there is no schedule of this name.
    """
    if name not in SCHEDULES:
        raise DiffgraftError(f"Invalid value schedule={name!r}: {did_you_mean(name, SCHEDULES)}")
    return SCHEDULES[name](steps, levels)
