"""Where the parts of a base are during a run: those that are needed on the device, all others in main memory."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from diffgraft.bases import Base
from diffgraft.third_party import quiet_libraries
from diffgraft.trainers.runtime.block_swap import BlockSwap, block_swap

_HOST = torch.device("cpu")


def offloadable(base: Base, *, has_texts: bool, uses_vae: bool = False) -> list[str]:
    """Names of the base's parts that training steps do not use, once latents are cached.

    These are the VAE, unless an inpainting base or the objective (`uses_vae`) needs it in every step, and the networks
    that prompts pass through if `has_texts`: all text embeddings are cached.
    """
    names = [] if base.is_inpainting or uses_vae else ["vae"]
    return names + ([*base.prompt_networks()] if has_texts else [])


class Placement:
    """The parts of a base on the device of a run. On a processor there is nothing to move."""

    def __init__(self, base: Base, device: torch.device, swap: BlockSwap | None, *, takes_turns: bool) -> None:
        """Move the base to main memory, unless `device` is the processor.

        Args:
            base: the base.
            device: the device that computes.
            swap: the blocks of the denoiser that stay in main memory.
            takes_turns: whether text encoders and denoiser may be on the device one after the other.
        """
        self._base, self._device, self._swap, self._takes_turns = base, device, swap, takes_turns
        self._has_own_memory = has_own_memory(device)
        self._here: set[str] = set()
        """Parts on the device"""
        if self._has_own_memory:
            base.to(_HOST)

    def only(self, names: Collection[str]) -> None:
        """Have these parts on the device, and no others."""
        if not self._has_own_memory or self._here == {*names}:
            return
        with quiet_libraries():
            for name in sorted(self._here.difference(names)):
                move(getattr(self._base, name), _HOST)
            for name in sorted({*names}.difference(self._here)):
                move(getattr(self._base, name), self._device)
        self._here = {*names}

    def all_but(self, names: Collection[str]) -> None:
        """Have all parts on the device but these."""
        self.only({name for name, _ in self._base.parts()}.difference(names))

    @contextmanager
    def turns(self) -> Iterator[None]:
        """Within the block text encoders and denoiser take turns: those that are called come, and the others leave.

        So the denoiser of a large base never shares the device with text encoders that are as large. The VAE is there.
        """
        if not self._takes_turns:
            self.all_but(())
        if not self._takes_turns or not self._has_own_memory:
            yield
            return
        self.only({"vae", *self._here})
        hooks = []
        for group in ({*self._base.prompt_networks()}, {self._base.family.denoiser}):
            for name in group:
                part: nn.Module = getattr(self._base, name)
                come = lambda *_, parts={"vae", *group}: self.only(parts)  # noqa: E731
                hooks.append(part.register_forward_pre_hook(come))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within the block everything is there that draws pictures; afterwards the parts are where they were."""
        here = {*self._here}
        self.release()
        if self._base.prompt_networks().keys() <= here:  # they are trained, or encode prompts in every step
            self.all_but(())
            yield
        else:
            with self.turns():
                yield
        self.only(here)

    def release(self) -> None:
        """Have the weights of swapped blocks in main memory, where they can be changed."""
        if self._swap is not None:
            self._swap.release()


@contextmanager
def placed(base: Base, device: torch.device, swapped: int, *, takes_turns: bool) -> Iterator[Placement]:
    """Within the block the base computes on `device`, to which its parts are moved; afterwards it is where it was.

    Args:
        base: the base.
        device: the device that computes.
        swapped: number of the denoiser's blocks that stay in main memory.
        takes_turns: as for `Placement`.
    """
    was_on = base.device
    try:
        with block_swap(base, swapped, device) as swap:
            placement = Placement(base, device, swap, takes_turns=takes_turns)
            base.computes_on = device
            yield placement
    finally:
        base.computes_on = None
        base.to(was_on)


def has_own_memory(device: torch.device) -> bool:
    """Whether a device has another memory than the processor."""
    return device.type != _HOST.type


def move(part: nn.Module, device: torch.device) -> None:
    """Move a part of a base to a device; blocks that are swapped stay where they are."""
    part.to(device)
