"""The denoising loss, and the module that the loop runs: UNet and text encoders of a base as one forward."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffgraft.bases import Base, Conditioning, Framing
from diffgraft.data.settings import Masks
from diffgraft.data.texts import Texts
from diffgraft.trainers.losses import distances, weights
from diffgraft.trainers.noise import check_range, draw_noise, draw_time, perturbed
from diffgraft.trainers.settings import Loss, Noise, Timesteps


class Denoiser(nn.Module):
    """A base's UNet, asked with prompts. Text states are computed once where the text encoder is frozen."""

    def __init__(
        self,
        base: Base,
        adapter: nn.Module | None = None,
        text_is_trained: bool = False,
        texts: Texts | None = None,
        whole: bool = False,
    ) -> None:
        """`texts` keeps what text encoders say, unless that is trained; `whole` prompts are read in pieces."""
        super().__init__()
        self.unet = base.unet
        self.text = nn.ModuleList(part for name, part in base.parts() if name.startswith("text_encoder"))
        self.adapter = adapter  # hooks run it; it is here so that its gradients are shared between processes
        self._base = base
        self._whole = whole
        kept = texts or Texts(base, whole=whole)
        # for an adapter that does something, and one that is bare
        self._texts = None if text_is_trained else {False: kept, True: kept}

    def condition(self, prompts: Sequence[str], frames: Sequence[Framing]) -> Conditioning:
        """What the UNet is told about n prompts, and about how their pictures were cut."""
        if self._texts is None:
            told = self._base.family.condition(self._base, prompts, self._whole)
        else:
            told = self._texts[getattr(self.adapter, "is_bare", False)](prompts)
        return told.framed(self._base.family.framing(frames))

    def freeze_text(self) -> None:
        """What text encoders say changes no more: from now on it is kept, with what is attached and without it."""
        if self._texts is None:
            self._texts = {bare: Texts(self._base, whole=self._whole) for bare in (False, True)}

    def forward(
        self, noisy: Tensor, times: Tensor, prompts: Sequence[str], frames: Sequence[Framing] | None = None
    ) -> Tensor:
        """Noisy latents [n, c, h, w], timesteps [n], n prompts → the UNet's prediction [n, c, h, w], float32.

        Without `frames` the pictures are taken to be whole.
        """
        if frames is None:
            height, width = (side * self._base.factor for side in noisy.shape[-2:])
            frames = [Framing((height, width), (0, 0), (height, width))] * len(prompts)
        told = self.condition(prompts, frames)
        prediction: Tensor = self.unet(self._base.unet_input(noisy), times, **told.kwargs()).sample
        return prediction.float()


class Noising:
    """A base's forward process, x_t = √ᾱ_t · x₀ + √(1 − ᾱ_t) · ε, and how its errors are counted.

    Ho et al. 2020, arXiv:2006.11239, equation 4.
    """

    def __init__(
        self,
        base: Base,
        noise: Noise | None = None,
        timesteps: Timesteps | None = None,
        loss: Loss | None = None,
        masks: Masks | None = None,
    ) -> None:
        from diffusers import DDPMScheduler

        self._scheduler = DDPMScheduler.from_config(base.scheduler.config)
        self._noise = noise or Noise.model_validate({})
        self._timesteps = timesteps or Timesteps.model_validate({})
        self._loss = loss or Loss.model_validate({})
        self._masks = masks or Masks.model_validate({})
        self.steps = int(self._scheduler.config.num_train_timesteps)
        self.predicts = base.prediction_type
        check_range(self._timesteps, self.steps)

    def __call__(self, latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents, and what the UNet should say of them; all [n, c, h, w], times [n].

        The target is ε, or v = √ᾱ_t · ε − √(1 − ᾱ_t) · x₀ (Salimans and Ho 2022, arXiv:2202.00512, section 4).
        """
        noisy = self._scheduler.add_noise(latents, noise, times)
        target = self._scheduler.get_velocity(latents, noise, times) if self.predicts == "v_prediction" else noise
        return noisy, target

    def kept(self, time: int) -> float:
        """ᾱ at a timestep: the share of a latent's variance that is the picture's."""
        return float(self._scheduler.alphas_cumprod[time])

    def time_of(self, kept: float) -> int:
        """The timestep at which ᾱ is nearest to `kept`."""
        return int((self._scheduler.alphas_cumprod - kept).abs().argmin())

    def at_places(self, latents: Tensor, seed: int, places: Sequence[int], kind: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents and targets [n, c, h, w] and timesteps [n] for `latents` [n, c, h, w] at these n places."""
        shape, device = latents.shape[1:], latents.device
        noise = torch.stack([draw_noise(shape, self._noise, seed, at, kind) for at in places])
        times = torch.tensor([draw_time(self.steps, self._timesteps, seed, at, kind) for at in places]).to(device)
        noisy, target = self(latents, noise.to(device), times)
        if self._noise.perturbation:
            more = torch.stack(
                [perturbed(own, self._noise, seed, at, kind) for own, at in zip(noise, places, strict=True)]
            )
            noisy, _ = self(latents, more.to(device), times)
        return noisy, target, times

    def errors(self, prediction: Tensor, target: Tensor, times: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of each sample, [n]; a `mask` [n, 1, h, w] says where they count."""
        alphas = self._scheduler.alphas_cumprod.to(prediction.device)
        apart = distances(prediction, target, times, alphas, self._loss)
        if mask is not None:
            counts = self._masks.outside + (1 - self._masks.outside) * mask
            if self._masks.normalize:
                counts = counts / counts.flatten(1).mean(1).clamp_min(1e-6).view(-1, 1, 1, 1)
            apart = apart * counts
        return apart.flatten(1).mean(1) * weights(times, alphas, self._loss, self.predicts)
