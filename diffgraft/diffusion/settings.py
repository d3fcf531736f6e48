"""Settings of noise, timesteps and losses, as recipes have them."""

from typing import Annotated, Literal

from pydantic import Field

from diffgraft.strict import Strict


class Noise(Strict):
    """Noise beyond plain Gaussian noise; 0 turns each kind off."""

    offset: float = Field(0.0, ge=0, le=10)
    """Standard deviation of a constant added to each channel of the noise (offset noise; 0.05 to 0.1 are common)"""
    pyramid: float = Field(0.0, ge=0, lt=1)
    """Factor from each level of pyramid noise to the next coarser one (0.3 to 0.8 are common)"""
    perturbation: float = Field(0.0, ge=0, le=10)
    """Strength γ of extra noise on the input alone (input perturbation; 0.1 in the paper)"""


class Timesteps(Strict):
    """Distribution of the training timesteps; timestep 0 has almost no noise."""

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
    shift: Literal["size"] | Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Shift s of the drawn share u of the schedule to s·u / (1 + (s − 1)·u); above 1 noisier timesteps are more
    frequent. size: the family's own for the number of patches in the latents, for flow matching"""


class Loss(Strict):
    """Loss function and loss weights."""

    kind: Literal["squared", "huber"] = "squared"
    """Squared error, or the pseudo-Huber loss, which counts large errors less"""
    delta: float = Field(0.1, gt=0, le=1)
    """Error at which the pseudo-Huber loss turns from quadratic to linear"""
    schedule: Literal["constant", "exponential", "snr"] = "constant"
    """Schedule of delta over the timesteps: constant, or falling from 1 to delta towards pure noise"""
    snr_gamma: float | None = Field(None, gt=0)
    """γ of min-SNR loss weights (5 in the paper); unset: all timesteps count alike"""
    debiased: bool = False
    """Debiased estimation: weight timesteps by 1 / √SNR, or by 1 / (SNR + 1) for v-prediction"""
