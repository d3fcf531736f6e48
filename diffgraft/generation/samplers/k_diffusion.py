"""Samplers with the numbers of k-diffusion, the library that webui and ComfyUI draw with.

Sources: Karras et al. 2022, arXiv:2206.00364 (Euler, Heun); Lu et al. 2022, arXiv:2206.00927 (DPM-Solver) and
arXiv:2211.01095 (DPM-Solver++); Xu et al. 2023, arXiv:2306.14878 (Restart); Luo et al. 2023, arXiv:2310.04378 (LCM).
Where k-diffusion differs from a paper, its numbers count. diffusers has schedulers of most of these names, which differ
by 0.4 % (DPM++ 2M) to 94 % (DPM++ SDE) after 20 steps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffgraft.generation.samplers.schedules import karras

Denoise = Callable[[Tensor, float], Tensor]
"""(latents [n, c, h, w], σ) → predicted clean latents [n, c, h, w]"""
Noise = Callable[[float, float], Tensor]
"""(σ before, σ after) → standard normal noise [n, c, h, w] for the step between them"""
Sampler = Callable[[Denoise, Tensor, Sequence[float], Noise], Iterator[Tensor]]
"""(denoise, latents at the first σ, σ of every step and 0, noise) → latents after each step"""

_PURE_NOISE = 1000.0
"""Noise levels above this one exist only where the terminal SNR is zero"""
_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Number of slopes → their weights, the newest first, in a step of even length"""


def euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:  # noqa: ARG001
    """Sample by Euler's method: one evaluation of the denoiser for each step."""
    for before, after in pairwise(sigmas):
        x = _toward(x, denoise(x, before), before, after)
        yield x


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """Euler steps to below the next noise level, and fresh noise up to it."""
    for before, after in pairwise(sigmas):
        down, up = _ancestral(before, after)
        x = _toward(x, denoise(x, before), before, down)
        if after > 0:
            x = x + noise(before, after) * up
        yield x


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:  # noqa: ARG001
    """Heun's method: the mean of the slopes at both ends of a step; the last step is Euler's, see `_heun_step`."""
    for before, after in pairwise(sigmas):
        x = _heun_step(denoise, x, before, after)
        yield x


def _heun_step(denoise: Denoise, x: Tensor, before: float, after: float) -> Tensor:
    slope = (x - denoise(x, before)) / before
    reached = x + slope * (after - before)
    # From pure noise (zero terminal SNR, σ = 4096), the mean of both slopes would add the difference of their predicted
    # latents times σ before / 2 σ after, which is more than 10: k-diffusion does so, and draws washed-out pictures.
    if after == 0 or before > _PURE_NOISE:
        return reached
    other = (reached - denoise(reached, after)) / after
    return x + (slope + other) / 2 * (after - before)


def dpm2(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:  # noqa: ARG001
    """DPM-Solver-2: the slope at the geometric mean of both noise levels; the last step is Euler's."""
    for before, after in pairwise(sigmas):
        x = _midpoint_step(denoise, x, before, after)
        yield x


def dpm2_ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver-2 to below the next noise level, and fresh noise up to it."""
    for before, after in pairwise(sigmas):
        down, up = _ancestral(before, after)
        x = _midpoint_step(denoise, x, before, down)
        if down > 0:
            x = x + noise(before, after) * up
        yield x


def _midpoint_step(denoise: Denoise, x: Tensor, before: float, after: float) -> Tensor:
    slope = (x - denoise(x, before)) / before
    if after == 0:
        return x + slope * (after - before)
    middle = math.sqrt(before * after)
    halfway = x + slope * (middle - before)
    return x + (halfway - denoise(halfway, middle)) / middle * (after - before)


def lms(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:  # noqa: ARG001
    """Linear multistep method (Adams–Bashforth) of order 4 on uneven steps."""
    slopes: list[Tensor] = []
    for step, (before, after) in enumerate(pairwise(sigmas)):
        slopes = [(x - denoise(x, before)) / before, *slopes[:3]]
        nodes = [sigmas[step - back] for back in range(len(slopes))]
        for back, slope in enumerate(slopes):
            x = x + slope * _lagrange_integral(nodes, back, before, after)
        yield x


def _lagrange_integral(nodes: Sequence[float], chosen: int, start: float, end: float) -> float:
    """Integral from `start` to `end` of the polynomial that is 1 at one node and 0 at the others."""
    polynomial = _lagrange(nodes, chosen)
    return sum(value * (end ** (n + 1) - start ** (n + 1)) / (n + 1) for n, value in enumerate(polynomial))


def _lagrange(nodes: Sequence[float], chosen: int) -> list[float]:
    """Coefficients, that of the constant first, of the polynomial that is 1 at one node and 0 at the others."""
    polynomial = [1.0]
    for place, node in enumerate(nodes):
        if place != chosen:
            gap = nodes[chosen] - node
            shifted, scaled = [0.0, *polynomial], [*(value * -node for value in polynomial), 0.0]
            polynomial = [(high + low) / gap for high, low in zip(shifted, scaled, strict=True)]
    return polynomial


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:  # noqa: ARG001
    """DPM-Solver++(2M): extrapolates from the prediction of the step before."""
    last, last_step = None, 0.0
    for before, after in pairwise(sigmas):
        clean = denoise(x, before)
        if after == 0:
            x = clean
            yield x
            return
        step = math.log(before / after)
        weight = step / last_step / 2 if last is not None else 0.0
        expected = clean if last is None else (1 + weight) * clean - weight * last
        x = _exponential(x, expected, step)
        last, last_step = clean, step
        yield x


def dpmpp_2s_ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver++(2S) to below the next noise level, and fresh noise up to it."""
    for before, after in pairwise(sigmas):
        down, up = _ancestral(before, after)
        clean = denoise(x, before)
        if down == 0:
            x = _toward(x, clean, before, down)
        else:
            step = math.log(before / down)
            halfway = _exponential(x, clean, step / 2)
            x = _exponential(x, denoise(halfway, math.sqrt(before * down)), step)
        if after > 0:
            x = x + noise(before, after) * up
        yield x


def dpmpp_sde(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver++ for the stochastic equation, with one evaluation halfway."""
    for before, after in pairwise(sigmas):
        clean = denoise(x, before)
        if after == 0:
            x = _toward(x, clean, before, after)
        else:
            middle = math.sqrt(before * after)
            down, up = _ancestral(before, middle)
            halfway = _exponential(x, clean, math.log(before / down)) + noise(before, middle) * up
            clean = denoise(halfway, middle)
            down, up = _ancestral(before, after)
            x = _exponential(x, clean, math.log(before / down)) + noise(before, after) * up
        yield x


def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, kind: Literal["midpoint", "heun"] = "midpoint"
) -> Iterator[Tensor]:
    """Sample by DPM-Solver++(2M) for the stochastic differential equation."""
    last, last_step = None, 0.0
    for before, after in pairwise(sigmas):
        clean = denoise(x, before)
        if after == 0:
            x = clean
            yield x
            return
        step = math.log(before / after)
        share = -math.expm1(-2 * step)
        x = after / before * math.exp(-step) * x + share * clean
        if last is not None:
            factor = share / 2 if kind == "midpoint" else 1 - share / (2 * step)
            x = x + factor * last_step**-1 * step * (clean - last)
        x = x + noise(before, after) * after * math.sqrt(share)
        last, last_step = clean, step
        yield x


def dpmpp_2m_sde_heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver++(2M) for the stochastic equation, with Heun's correction."""
    return dpmpp_2m_sde(denoise, x, sigmas, noise, "heun")


def dpmpp_3m_sde(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """Sample by DPM-Solver++(3M) for the stochastic differential equation."""
    earlier: list[tuple[Tensor, float]] = []
    """Predictions of the two steps before, the newest first, and the length of those steps"""
    for before, after in pairwise(sigmas):
        clean = denoise(x, before)
        if after == 0:
            x = clean
            yield x
            return
        step = math.log(before / after)
        both = 2 * step
        share = -math.expm1(-both)
        x = math.exp(-both) * x + share * clean
        if earlier:
            second = 1 - share / both
            ratio = earlier[0][1] / step
            first_slope = (clean - earlier[0][0]) / ratio
            if len(earlier) == 1:
                x = x + second * first_slope
            else:
                ratio_2 = earlier[1][1] / step
                second_slope = (earlier[0][0] - earlier[1][0]) / ratio_2
                bend = (first_slope - second_slope) / (ratio + ratio_2)
                x = x + second * (first_slope + bend * ratio) - (second / both - 0.5) * bend
        x = x + noise(before, after) * after * math.sqrt(share)
        earlier = [(clean, step), *earlier[:1]]
        yield x


def restart(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """Heun's method that goes back from σ ≈ 0.1 to σ ≈ 2 and down again, once, or twice from 36 steps on.

    The number of steps stays the same: those of the restarts are taken from the descent.
    """
    last = sigmas[0]
    for before, after in restart_steps(sigmas):
        if before > last:
            x = x + noise(last, before) * math.sqrt(before**2 - last**2)
        x = _heun_step(denoise, x, before, after)
        last = after
        yield x


def restart_steps(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    """Return the noise levels before and after each step of `restart`; below 20 steps it does not restart."""
    count = len(sigmas) - 1
    if count < 20:
        return list(pairwise(sigmas))
    times, length = (1, 9) if count < 36 else (2, count // 4)
    sigmas = karras(count - length * times, sigmas[-2], sigmas[0])
    low, high = (min(range(len(sigmas)), key=lambda place: abs(sigmas[place] - level)) for level in (0.1, 2.0))
    steps = list(pairwise(sigmas))
    if high < low:
        again = list(pairwise(karras(length + 1, sigmas[low], sigmas[high])[:-1]))
        steps[low:low] = again * times
    return steps


def plms(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:  # noqa: ARG001
    """Pseudo linear multistep method of order 4 (Liu et al. 2022, arXiv:2202.09778), as in CompVis' PLMS.

    The first step is a pseudo improved Euler step.
    """
    slopes: list[Tensor] = []
    for before, after in pairwise(sigmas):
        slopes = [(x - denoise(x, before)) / before, *slopes[:3]]
        if len(slopes) == 1 and after > 0:
            reached = x + slopes[0] * (after - before)
            slope = (slopes[0] + (reached - denoise(reached, after)) / after) / 2
        else:
            weights = _ADAMS_BASHFORTH[len(slopes)]
            slope = torch.stack([weight * own for weight, own in zip(weights, slopes, strict=True)]).sum(0)
        x = x + slope * (after - before)
        yield x


def deis(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:  # noqa: ARG001
    """DEIS of order 3, Adams–Bashforth in log σ (Zhang and Chen 2022, arXiv:2204.13902, ``ρAB`` in log ρ)."""
    slopes: list[Tensor] = []
    for step, (before, after) in enumerate(pairwise(sigmas)):
        slopes = [(x - denoise(x, before)) / before, *slopes[:2]]
        if after == 0:
            x = x - slopes[0] * before
        else:
            nodes = [math.log(sigmas[step - back]) for back in range(len(slopes))]
            for back, slope in enumerate(slopes):
                x = x + slope * _lagrange_log_integral(nodes, back, before, after)
        yield x


def _lagrange_log_integral(nodes: Sequence[float], chosen: int, start: float, end: float) -> float:
    """Integral over σ from `start` to `end` of the polynomial in log σ that is 1 at one node and 0 at the others."""
    shift = nodes[chosen]  # logarithms relative to it keep their digits
    polynomial = _lagrange([node - shift for node in nodes], chosen)

    def antiderivative(sigma: float) -> float:
        log, total = math.log(sigma) - shift, 0.0
        for power, coefficient in enumerate(polynomial):  # ∫ uⁿ eᵘ du = eᵘ · Σ (−1)ᵏ n! / (n − k)! · uⁿ⁻ᵏ
            terms = ((-1) ** k * math.perm(power, k) * log ** (power - k) for k in range(power + 1))
            total += coefficient * sigma * sum(terms)
        return total

    return antiderivative(end) - antiderivative(start)


def lcm(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """Consistency models: the prediction itself, with fresh noise of the next level."""
    for before, after in pairwise(sigmas):
        x = denoise(x, before)
        if after > 0:
            x = x + noise(before, after) * after
        yield x


def _toward(x: Tensor, clean: Tensor, before: float, after: float) -> Tensor:
    """Euler's step along the line from x to the clean latents."""
    return x + (x - clean) / before * (after - before)


def _exponential(x: Tensor, clean: Tensor, step: float) -> Tensor:
    """Exponential step toward clean latents, by the logarithm of the ratio of both noise levels."""
    return math.exp(-step) * x - math.expm1(-step) * clean


def _ancestral(before: float, after: float) -> tuple[float, float]:
    """Return the noise level to go down to, and the standard deviation of the noise that leads up to `after`."""
    up = min(after, math.sqrt(after**2 * (before**2 - after**2) / before**2))
    return math.sqrt(after**2 - up**2), up
