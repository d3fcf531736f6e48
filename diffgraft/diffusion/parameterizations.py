"""Parameterizations of a denoiser: it predicts the noise ε, the velocity v, or the flow.

All of them mix a clean latent x₀ and noise ε of unit variance as x_t = α_t · x₀ + σ_t · ε, where t is an index into a
schedule of `num_timesteps`, 0 being almost clean. They differ in α and σ and in what is predicted of x_t:

======== ============================ ==================== =====================
          α, σ                         target               x₀ from a prediction
======== ============================ ==================== =====================
Epsilon  √ᾱ, √(1 − ᾱ)                  ε                    (x_t − σ · ε) / α
V        √ᾱ, √(1 − ᾱ)                  α · ε − σ · x₀       α · x_t − σ · v
Flow     1 − σ, σ                      ε − x₀               x_t − σ · u
======== ============================ ==================== =====================

Sources: Ho et al. 2020, arXiv:2006.11239, equation 4; Salimans and Ho 2022, arXiv:2202.00512, section 4; Lipman et al.
2023, arXiv:2210.02747, and Esser et al. 2024, arXiv:2403.03206, section 2.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from diffgraft.errors import DiffgraftError

_MAX_SNR = 1000.0
"""Signal-to-noise ratio to which debiased estimation clamps that of almost clean latents"""


class Parameterization(ABC):
    """Prediction of a denoiser, and the noise schedule it was trained with."""

    name: ClassVar[str]
    """Name in headers and recipes: `epsilon`, `v_prediction` or `flow`"""

    alphas: Tensor
    """α of every timestep, [num_timesteps]"""
    sigmas: Tensor
    """σ of every timestep, [num_timesteps]"""

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps in the schedule."""
        return len(self.alphas)

    def noised(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents x_t [n, c, h, w] for clean latents and noise [n, c, h, w] at `timesteps` [n]."""
        alpha, sigma = self._mixed(x0, timesteps)
        return alpha * x0 + sigma * noise

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target [n, c, h, w] of the prediction for clean latents and noise [n, c, h, w] at `timesteps`."""

    @abstractmethod
    def x0(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean latents [n, c, h, w] implied by a prediction for `noisy` [n, c, h, w] at `timesteps` [n]."""

    @abstractmethod
    def alpha_at(self, level: float) -> float:
        """Return α at the noise level σ / α = `level`, which may lie between two timesteps."""

    @abstractmethod
    def x0_at(self, x: Tensor, prediction: Tensor, level: float) -> Tensor:
        """Return the clean latents [n, c, h, w] implied by a prediction for α · x, where x = x₀ + `level` · ε.

        Samplers work in this convention of Karras et al. 2022, arXiv:2206.00364.
        """

    def signal(self, timesteps: Tensor) -> Tensor:
        """Return α² at `timesteps` [n], the share of the picture in a latent's variance."""
        return self.alphas.to(timesteps.device)[timesteps].square()

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio α² / σ² at `timesteps` [n], in float64."""
        alpha, sigma = (table.to(timesteps.device)[timesteps].double() for table in (self.alphas, self.sigmas))
        return alpha.square() / sigma.square().clamp_min(1e-12)

    @abstractmethod
    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return the min-SNR-γ loss weight at `timesteps` [n] (Hang et al. 2023, arXiv:2303.09556, section 3.4).

        Raises:
            DiffgraftError: the weight is not defined for this parameterization.
        """

    @abstractmethod
    def debiased_weight(self, timesteps: Tensor) -> Tensor:
        """Return the loss weight of debiased estimation at `timesteps` [n] (Yu et al. 2023, arXiv:2310.08442).

        Raises:
            DiffgraftError: the weight is not defined for this parameterization.
        """

    def nearest_timestep(self, alpha_squared: float) -> int:
        """Return the timestep whose α² is nearest to `alpha_squared`."""
        return int((self.signal(torch.arange(self.num_timesteps)) - alpha_squared).abs().argmin())

    def _mixed(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return α and σ at `timesteps` [n] as [n, 1, …], with the dtype and device of `like` [n, …]."""
        shape = (-1, *[1] * (like.ndim - 1))
        alpha, sigma = (table.to(like)[timesteps.to(like.device)].view(shape) for table in (self.alphas, self.sigmas))
        return alpha, sigma


class _VariancePreserving(Parameterization):
    """A schedule with α² + σ² = 1, given as ᾱ = α²."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """Create the schedule from ᾱ of every timestep, [num_timesteps]."""
        self.alphas_cumprod = alphas_cumprod
        self.alphas, self.sigmas = alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5

    def alpha_at(self, level: float) -> float:
        """Return 1 / √(1 + level²)."""
        return float(1 / (1 + level**2) ** 0.5)

    def signal(self, timesteps: Tensor) -> Tensor:
        """Return ᾱ at `timesteps` [n]."""
        return self.alphas_cumprod.to(timesteps.device)[timesteps]

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio ᾱ / (1 − ᾱ) at `timesteps` [n], in float64."""
        signal = self.signal(timesteps).double()
        return signal / (1 - signal).clamp_min(1e-12)


class Epsilon(_VariancePreserving):
    """The denoiser predicts the noise ε (Ho et al. 2020)."""

    name = "epsilon"

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:  # noqa: ARG002
        return noise

    def x0(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self._mixed(noisy, timesteps)
        return (noisy - sigma * prediction) / alpha

    def x0_at(self, x: Tensor, prediction: Tensor, level: float) -> Tensor:
        return x - level * prediction

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return min(SNR, γ) / SNR at `timesteps` [n]."""
        snr = self.snr(timesteps)
        return (snr.clamp_max(gamma) / snr.clamp_min(1e-12)).float()

    def debiased_weight(self, timesteps: Tensor) -> Tensor:
        """Return 1 / √SNR at `timesteps` [n], with SNR clamped to at most 1000."""
        return self.snr(timesteps).clamp(1e-12, _MAX_SNR).rsqrt().float()


class V(_VariancePreserving):
    """The denoiser predicts the velocity v = α · ε − σ · x₀ (Salimans and Ho 2022)."""

    name = "v_prediction"

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self._mixed(x0, timesteps)
        return alpha * noise - sigma * x0

    def x0(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self._mixed(noisy, timesteps)
        return alpha * noisy - sigma * prediction

    def x0_at(self, x: Tensor, prediction: Tensor, level: float) -> Tensor:
        alpha = self.alpha_at(level)
        return alpha * (alpha * x - level * prediction)

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return min(SNR, γ) / (SNR + 1) at `timesteps` [n]."""
        snr = self.snr(timesteps)
        return (snr.clamp_max(gamma) / (snr + 1)).float()

    def debiased_weight(self, timesteps: Tensor) -> Tensor:
        """Return 1 / (SNR + 1) at `timesteps` [n]."""
        return (1 / (self.snr(timesteps) + 1)).float()


class Flow(Parameterization):
    """The denoiser predicts the velocity ε − x₀ of a straight path from data to noise (rectified flow)."""

    name = "flow"

    def __init__(self, num_timesteps: int = 1000, shift: float = 1.0) -> None:
        """Create a schedule with σ_i = s · u / (1 + (s − 1) · u), where u = (i + 1) / num_timesteps and s = `shift`.

        Larger shifts spend more of the schedule on noisy latents (Esser et al. 2024, equation 23).
        """
        even = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
        sigmas = shift * even / (1 + (shift - 1) * even)
        self.alphas, self.sigmas = (1 - sigmas).float(), sigmas.float()

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:  # noqa: ARG002
        return noise - x0

    def x0(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        _, sigma = self._mixed(noisy, timesteps)
        return noisy - sigma * prediction

    def alpha_at(self, level: float) -> float:
        """Return 1 / (1 + level)."""
        return 1 / (1 + level)

    def x0_at(self, x: Tensor, prediction: Tensor, level: float) -> Tensor:
        return self.alpha_at(level) * (x - level * prediction)

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:  # noqa: ARG002
        """Raise DiffgraftError: the weight is derived for ᾱ of a variance-preserving schedule."""
        raise DiffgraftError("Min-SNR weighting is undefined for flow matching: leave loss.snr_gamma out.")

    def debiased_weight(self, timesteps: Tensor) -> Tensor:  # noqa: ARG002
        """Raise DiffgraftError: the weight is derived for ε and v of a variance-preserving schedule."""
        raise DiffgraftError("Debiased estimation is undefined for flow matching: set loss.debiased=false.")


def parameterization(name: str, alphas_cumprod: Tensor) -> Parameterization:
    """Return `Epsilon` or `V` on a schedule of ᾱ [num_timesteps], by the prediction type of diffusers' schedulers.

    Raises:
        DiffgraftError: the prediction type is unknown.
    """
    kinds = {kind.name: kind for kind in (Epsilon, V)}
    if name not in kinds:
        raise DiffgraftError(f"Unknown prediction type {name!r}: expected {' or '.join(kinds)}.")
    return kinds[name](alphas_cumprod)
