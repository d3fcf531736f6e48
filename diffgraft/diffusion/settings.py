"""Settings of noise, timesteps and losses, as recipes have them."""

from typing import Literal

from pydantic import Field

from diffgraft.strict import Strict


class Noise(Strict):
    """What is laid on latents beside plain noise; 0 leaves each away."""

    offset: float = Field(0.0, ge=0, le=10)
    """Standard deviation of one number added to all of a channel (offset noise; 0.05 to 0.1 are common)"""
    pyramid: float = Field(0.0, ge=0, lt=1)
    """Factor from one level of coarser noise to the next (pyramid noise; 0.3 to 0.8 are common)"""
    perturbation: float = Field(0.0, ge=0, le=10)
    """Share γ of further noise that is laid on the input alone (input perturbation; 0.1 in the paper)"""


class Timesteps(Strict):
    """At which timesteps training takes place; 0 is almost no noise."""

    min: int = Field(0, ge=0)
    """Smallest timestep"""
    max: int | None = Field(None, ge=0)
    """Largest timestep; unset: the last of the base's schedule"""
    distribution: Literal["uniform", "logit-normal"] = "uniform"
    """Distribution of the timesteps: uniform, or the sigmoid of a normal variable, which prefers the middle"""
    mean: float = 0.0
    """Mean of that normal variable; above 0 noisier timesteps are more frequent"""
    std: float = Field(1.0, gt=0)
    """Standard deviation of that normal variable"""


class Loss(Strict):
    """How errors are counted."""

    kind: Literal["squared", "huber"] = "squared"
    """The squared error, or the pseudo-Huber loss, in which large errors count less"""
    delta: float = Field(0.1, gt=0, le=1)
    """Where the Huber loss turns from squared to linear"""
    schedule: Literal["constant", "exponential", "snr"] = "constant"
    """How delta goes on the way to noise: the same everywhere, or falling to delta from 1"""
    snr_gamma: float | None = Field(None, gt=0)
    """γ of min-SNR weighting (5 in the paper); unset: every timestep counts alike"""
    debiased: bool = False
    """Weigh each timestep by 1 / √SNR, or 1 / (SNR + 1) where v is predicted (debiased estimation)"""
