"""Samplers by the names of webui, and what each of them is used with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.generation.samplers import by_diffusers, k_diffusion
from diffgraft.generation.samplers.k_diffusion import Sampler
from diffgraft.generation.samplers.schedules import SCHEDULES, NoiseLevels, schedule_sigmas


@dataclass(frozen=True)
class NamedSampler:
    """A sampler, and the noise schedule that webui uses with it."""

    label: str
    """Name as webui writes it"""
    run: Sampler
    schedule: str = "uniform"
    """Schedule that is used unless another one is asked for"""
    drops_second_last: bool = False
    """Whether the second last noise level is left out, as the sampler is unstable there; one more is then computed"""
    is_random: bool = False
    """Whether it adds noise on the way"""
    has_path: bool = False
    """Whether this noise is that of a Brownian path, as in webui"""


_LISTED = (
    NamedSampler("Euler", k_diffusion.euler),
    NamedSampler("Euler a", k_diffusion.euler_ancestral, is_random=True),
    NamedSampler("LMS", k_diffusion.lms),
    NamedSampler("Heun", k_diffusion.heun),
    NamedSampler("DPM2", k_diffusion.dpm2, "karras", drops_second_last=True),
    NamedSampler("DPM2 a", k_diffusion.dpm2_ancestral, "karras", drops_second_last=True, is_random=True),
    NamedSampler("DPM++ 2M", k_diffusion.dpmpp_2m, "karras"),
    NamedSampler("DPM++ 2M SDE", k_diffusion.dpmpp_2m_sde, "exponential", is_random=True, has_path=True),
    NamedSampler("DPM++ 2M SDE Heun", k_diffusion.dpmpp_2m_sde_heun, "exponential", is_random=True, has_path=True),
    NamedSampler(
        "DPM++ 3M SDE", k_diffusion.dpmpp_3m_sde, "exponential", drops_second_last=True, is_random=True, has_path=True
    ),
    NamedSampler("DPM++ 2S a", k_diffusion.dpmpp_2s_ancestral, "karras", is_random=True),
    NamedSampler("DPM++ SDE", k_diffusion.dpmpp_sde, "karras", is_random=True, has_path=True),
    NamedSampler("Restart", k_diffusion.restart, "karras", is_random=True),
    NamedSampler("UniPC", by_diffusers.unipc),
    NamedSampler("DEIS", k_diffusion.deis),
    NamedSampler("PLMS", k_diffusion.plms, "ddim"),
    NamedSampler("LCM", k_diffusion.lcm, "sgm uniform", is_random=True),
    NamedSampler("DDIM", k_diffusion.euler, "ddim"),
)
SAMPLERS: Mapping[str, NamedSampler] = {sampler.label.lower(): sampler for sampler in _LISTED}
"""Name in small letters → sampler; DDIM without noise is Euler's method on its own noise levels (Karras et al. 2022,
appendix C.3)"""


def named_sampler(name: str) -> NamedSampler:
    """Return the sampler of a name, in capitals or not.

    Raises:
        DiffgraftError: there is none of this name.
    """
    known = SAMPLERS.get(name.lower())
    if known is None:
        for schedule in SCHEDULES:  # older versions of webui have both in one name
            if (
                name.lower().endswith(f" {schedule}")
                and (plain := name.lower().removesuffix(f" {schedule}")) in SAMPLERS
            ):
                raise DiffgraftError(
                    f"Invalid value sampler={name!r}: use sampler={plain!r} and schedule={schedule!r}."
                )
        raise DiffgraftError(f"Invalid value sampler={name!r}: {did_you_mean(name.lower(), SAMPLERS)}")
    return known


def sampler_sigmas(
    sampler: NamedSampler,
    schedule: str | None,
    steps: int,
    levels: NoiseLevels,
    of_family: Callable[[int], list[float] | None] = lambda steps: None,  # noqa: ARG005
) -> list[float]:
    """Return the noise levels that a sampler runs through; none comes twice in turn.

    Args:
        sampler: the sampler.
        schedule: name of a schedule; None: the one of the family, else the sampler's own.
        steps: number of steps.
        levels: noise levels of the base.
        of_family: function from a number of steps to the noise levels of the base's family, if it has its own.
    """
    count = steps + sampler.drops_second_last
    own = of_family(count) if schedule is None else None
    sigmas = own or schedule_sigmas(schedule or sampler.schedule, count, levels)
    sigmas = [*sigmas[:-2], sigmas[-1]] if sampler.drops_second_last else sigmas
    return [sigma for place, sigma in enumerate(sigmas) if place == 0 or sigma != sigmas[place - 1]]
