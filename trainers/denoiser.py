"""The module that the training loop runs: text encoders and denoiser of a base in one forward pass."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from diffgraft.adapters.method import Attached
from diffgraft.bases import Base, Conditioning, SizeConditioning
from diffgraft.bases.family import ControlSignal
from diffgraft.data.text_embeddings import TextEmbeddingCache
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.trainers.recipe.groups import ObjectiveSettings


class Denoiser(nn.Module):
    """Text encoders and denoiser of a base as one module; frozen text encoders run once per prompt."""

    def __init__(
        self,
        base: Base,
        adapter: Attached | None = None,
        text_is_trained: bool = False,
        texts: TextEmbeddingCache | None = None,
        whole: bool = False,
    ) -> None:
        """Take the parts of `base`.

        Args:
            base: the base, with the adapter attached.
            adapter: what is attached.
            text_is_trained: whether the outputs of text encoders change during training, and are not cached.
            texts: cache of text embeddings.
            whole: whether prompts beyond the context of the text encoder are encoded in chunks.
        """
        super().__init__()
        self.denoiser = base.denoiser
        self.text = nn.ModuleList(base.prompt_networks().values())
        self.adapter = (
            adapter  # hooks run it; as a submodule it takes part in the gradient synchronization of processes
        )
        self._base = base
        self._whole = whole
        cache = texts or TextEmbeddingCache(base, whole=whole)
        # strength of the adapter → its cache
        self._texts: defaultdict[float, TextEmbeddingCache] | None = (
            None if text_is_trained else defaultdict(lambda: cache)
        )

    def condition(self, prompts: Sequence[str], frames: Sequence[SizeConditioning]) -> Conditioning:
        """Return the conditioning of n prompts, with the size conditioning of their n frames."""
        if self._texts is None:
            conditioning = self._base.family.encode(self._base, prompts, self._whole)
        else:
            adapter = self.adapter
            conditioning = self._texts[0.0 if adapter is None or adapter.is_disabled else adapter.strength](prompts)
        return replace(
            conditioning.with_size(self._base.family.size_conditioning(frames)), control=self._control_signal(frames)
        )

    def _control_signal(self, frames: Sequence[SizeConditioning]) -> ControlSignal | None:
        """Return what a control network gets for n frames of one size; None if the adapter has none, or is disabled."""
        if self.adapter is None or self.adapter.control is None or self.adapter.is_disabled:
            return None
        pictures = [frame.control for frame in frames if frame.control is not None]
        assert len(pictures) == len(frames), "a sample has no condition picture"
        return ControlSignal(self.adapter.control, torch.stack(pictures))

    def freeze_text(self) -> None:
        """Cache text embeddings from now on, with and without the adapter, as text encoders and words train no more."""
        if self._texts is None:
            self._texts = defaultdict(lambda: TextEmbeddingCache(self._base, whole=self._whole))

    def forward(
        self, noisy: Tensor, times: Tensor, prompts: Sequence[str], frames: Sequence[SizeConditioning] | None = None
    ) -> Tensor:
        """Predict from noisy latents [n, c, h, w], timesteps [n] and n prompts: [n, c, h, w], float32.

        Without `frames` the pictures count as uncropped.
        """
        if frames is None:
            height, width = (side * self._base.vae_scale_factor for side in noisy.shape[-2:])
            frames = [SizeConditioning((height, width), (0, 0), (height, width))] * len(prompts)
        conditioning = self.condition(prompts, frames)
        return self._base.family.denoise(self._base, self.denoiser, noisy, times, conditioning).float()


def forward_process(base: Base, settings: ObjectiveSettings | None = None) -> ForwardProcess:
    """Return the forward process of a base; without settings with plain noise and the squared error.

    Raises:
        DiffgraftError: the base's schedule has no such timesteps, or a loss is undefined for what it predicts.
    """
    if settings is None:
        return ForwardProcess(base.parameterization)
    shift = base.family.timestep_shift if base.family.has_timestep_shift else None
    size_shift = None if shift is None else partial(shift, base)
    return ForwardProcess(base.parameterization, settings.noise, settings.timesteps, settings.loss, size_shift)
