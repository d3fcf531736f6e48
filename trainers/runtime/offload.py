"""Networks that a run does not need for a while leave the accelerator's memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffgraft.bases import Base
from diffgraft.third_party import quiet_libraries


def offloadable(base: Base, *, has_texts: bool) -> list[str]:
    """Parts of the base that training can do without when latents, and texts if `has_texts`, are computed.

    On a processor there is no other memory for them to go to; the VAE of an inpainting base is asked on the way.
    """
    if base.device.type == "cpu":
        return []
    names = [] if base.is_inpainting else ["vae"]
    texts = [*base.text_encoders()]
    return names + (texts if has_texts else [])


def offload(base: Base, names: Sequence[str]) -> None:
    """Move these parts to the processor's memory."""
    with quiet_libraries():
        for name in names:
            getattr(base, name).to("cpu")


def onload(base: Base, names: Sequence[str]) -> None:
    """Move them to where the denoiser is."""
    with quiet_libraries():
        for name in names:
            getattr(base, name).to(base.device)


@contextmanager
def loaded(base: Base, names: Sequence[str]) -> Iterator[None]:
    """Within the block they are there, for drawing."""
    onload(base, names)
    try:
        yield
    finally:
        offload(base, names)
