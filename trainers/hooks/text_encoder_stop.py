"""Stops the training of text encoders and token embeddings at a step of the run."""

from collections.abc import Collection

from diffgraft.adapters.method import Attached
from diffgraft.trainers.denoiser import Denoiser
from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.optim.lr_scales import freeze_text_parameters
from diffgraft.trainers.runtime.interrupts import defer_sigint
from diffgraft.trainers.state import TrainingState


class TextEncoderStopHook(Hook):
    """Freezes text encoders and token embeddings after a step, and again when the run is resumed after that step."""

    name = "text encoder stop"

    def __init__(self, step: int, adapter: Attached, denoiser: Denoiser) -> None:
        self._step, self._adapter, self._denoiser = step, adapter, denoiser

    def is_overdue(self, state: TrainingState) -> bool:
        return state.step >= self._step and not state.is_over

    def is_due(self, state: TrainingState, asked: Collection[str]) -> bool:  # noqa: ARG002
        return state.step == self._step and not state.is_over

    def run(self, state: TrainingState) -> None:
        with defer_sigint():
            freeze_text_parameters(self._adapter, state.optimizer, state.ema)
            self._denoiser.freeze_text()
