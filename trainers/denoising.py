"""The denoising loss, and the module that the loop runs: UNet and text encoders of a base as one forward."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffgraft.bases import Base, Conditioning


class Denoiser(nn.Module):
    """A base's UNet, asked with prompts. Text states are computed once where the text encoder is frozen."""

    def __init__(
        self, base: Base, size: tuple[int, int], adapter: nn.Module | None = None, text_is_trained: bool = False
    ) -> None:
        super().__init__()
        self.unet = base.unet
        self.text = nn.ModuleList(part for name, part in base.parts() if name.startswith("text_encoder"))
        self.adapter = adapter  # hooks run it; it is here so that its gradients are shared between processes
        self._base = base
        self._size = size
        self._cache: dict[str, Conditioning] | None = None if text_is_trained else {}

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        """What the UNet is told about n prompts."""
        if self._cache is None:
            return self._base.condition(prompts, self._size)
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._cache:
                with torch.no_grad():
                    self._cache[prompt] = self._base.condition([prompt], self._size)
        kept = [self._cache[prompt] for prompt in prompts]
        added = {name: torch.cat([one.added[name] for one in kept]) for name in kept[0].added}
        return Conditioning(torch.cat([one.hidden_states for one in kept]), added)

    def forward(self, noisy: Tensor, times: Tensor, prompts: Sequence[str]) -> Tensor:
        """Noisy latents [n, c, h, w], timesteps [n], n prompts → the UNet's prediction [n, c, h, w], float32."""
        told = self.condition(prompts)
        prediction: Tensor = self.unet(self._base.unet_input(noisy), times, **told.kwargs()).sample
        return prediction.float()


class Noising:
    """A base's forward process: x_t = √ᾱ_t · x₀ + √(1 − ᾱ_t) · ε (Ho et al. 2020, arXiv:2006.11239, equation 4)."""

    def __init__(self, base: Base) -> None:
        from diffusers import DDPMScheduler

        self._scheduler = DDPMScheduler.from_config(base.scheduler.config)
        self.steps = int(self._scheduler.config.num_train_timesteps)
        self.predicts = base.prediction_type

    def __call__(self, latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents, and what the UNet should say of them; all [n, c, h, w], times [n].

        The target is ε, or v = √ᾱ_t · ε − √(1 − ᾱ_t) · x₀ (Salimans and Ho 2022, arXiv:2202.00512, section 4).
        """
        noisy = self._scheduler.add_noise(latents, noise, times)
        target = self._scheduler.get_velocity(latents, noise, times) if self.predicts == "v_prediction" else noise
        return noisy, target


def per_sample_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, [n]."""
    return (prediction - target).square().flatten(1).mean(1)
