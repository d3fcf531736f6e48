"""The module that the loop runs: denoiser and text encoders of a base as one forward."""

from collections.abc import Sequence

from torch import Tensor, nn

from diffgraft.bases import Base, Conditioning, SizeConditioning
from diffgraft.data.text_embeddings import TextEmbeddingCache
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.trainers.recipe.groups import ObjectiveSettings


class Denoiser(nn.Module):
    """A base's denoiser, asked with prompts. Text states are computed once where the text encoder is frozen."""

    def __init__(
        self,
        base: Base,
        adapter: nn.Module | None = None,
        text_is_trained: bool = False,
        texts: TextEmbeddingCache | None = None,
        whole: bool = False,
    ) -> None:
        """`texts` keeps what text encoders say, unless that is trained; `whole` prompts are read in pieces."""
        super().__init__()
        self.denoiser = base.denoiser
        self.text = nn.ModuleList(base.text_encoders().values())
        self.adapter = adapter  # hooks run it; it is here so that its gradients are shared between processes
        self._base = base
        self._whole = whole
        kept = texts or TextEmbeddingCache(base, whole=whole)
        # for an adapter that does something, and one that is bare
        self._texts = None if text_is_trained else {False: kept, True: kept}

    def condition(self, prompts: Sequence[str], frames: Sequence[SizeConditioning]) -> Conditioning:
        """What the denoiser is told about n prompts, and about how their pictures were cut."""
        if self._texts is None:
            told = self._base.family.encode(self._base, prompts, self._whole)
        else:
            told = self._texts[getattr(self.adapter, "is_disabled", False)](prompts)
        return told.with_size(self._base.family.size_conditioning(frames))

    def freeze_text(self) -> None:
        """What text encoders say changes no more: from now on it is kept, with what is attached and without it."""
        if self._texts is None:
            self._texts = {bare: TextEmbeddingCache(self._base, whole=self._whole) for bare in (False, True)}

    def forward(
        self, noisy: Tensor, times: Tensor, prompts: Sequence[str], frames: Sequence[SizeConditioning] | None = None
    ) -> Tensor:
        """Noisy latents [n, c, h, w], timesteps [n], n prompts → the prediction [n, c, h, w], float32.

        Without `frames` the pictures are taken to be whole.
        """
        if frames is None:
            height, width = (side * self._base.vae_scale_factor for side in noisy.shape[-2:])
            frames = [SizeConditioning((height, width), (0, 0), (height, width))] * len(prompts)
        told = self.condition(prompts, frames)
        return self._base.family.denoise(self._base, self.denoiser, noisy, times, told).float()


def forward_process(base: Base, settings: ObjectiveSettings | None = None) -> ForwardProcess:
    """The forward process of a base, plain where no settings are given.

    Raises:
        DiffgraftError: the base's schedule has no such timesteps, or a loss is undefined for what it predicts.
    """
    if settings is None:
        return ForwardProcess(base.parameterization)
    return ForwardProcess(base.parameterization, settings.noise, settings.timesteps, settings.loss)
