"""Offloading: networks that a run does not need for a while move from GPU memory to CPU memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffgraft.bases import Base
from diffgraft.third_party import quiet_libraries


def offloadable(base: Base, *, has_texts: bool, uses_vae: bool = False) -> list[str]:
    """Names of the base's parts that training steps do not use, once latents are cached.

    These are the VAE, unless an inpainting base or the objective (`uses_vae`) needs it in every step, and the networks
    that prompts pass through if `has_texts`: all text embeddings are cached. On a CPU there is nothing to offload.
    """
    if base.device.type == "cpu":
        return []
    names = [] if base.is_inpainting or uses_vae else ["vae"]
    return names + ([*base.prompt_networks()] if has_texts else [])


def offload(base: Base, names: Sequence[str]) -> None:
    """Move parts of the base to CPU memory."""
    with quiet_libraries():
        for name in names:
            getattr(base, name).to("cpu")


def onload(base: Base, names: Sequence[str]) -> None:
    """Move parts of the base back to the denoiser's device."""
    with quiet_libraries():
        for name in names:
            getattr(base, name).to(base.device)


@contextmanager
def loaded(base: Base, names: Sequence[str]) -> Iterator[None]:
    """Within the block the offloaded parts `names` are on the denoiser's device, for generating images."""
    onload(base, names)
    try:
        yield
    finally:
        offload(base, names)
