"""Stage 1 of the training: the autoencoder, which encodes 64 × 64 × 3 pictures as 16 × 16 × 4 latents."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from diffgraft.bases.tiny.train.fit import StagePlan, autocast, fit
from diffgraft.bases.tiny.train.pictures import pictures, to_tensor


def new_vae() -> AutoencoderKL:
    """Create the untrained autoencoder."""
    widths = (32, 64, 96)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
    )


class Autoencoder(nn.Module):
    """The autoencoder in one forward pass: encode pictures, sample latents, decode them."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction of pictures `x`, and the mean and log variance of their latents."""
        mean, logvar = self.vae.quant_conv(self.vae.encoder(x)).chunk(2, 1)
        logvar = logvar.clamp(-20, 10)
        z = mean + noise * (logvar / 2).exp()
        return self.vae.decoder(self.vae.post_quant_conv(z)), mean, logvar


def train_vae(work: Path, count: int, plan: StagePlan) -> AutoencoderKL:
    """Train the autoencoder, or resume from the checkpoint in `work`.

    It learns from `count` pictures of the tiny world and a fifth as many dead-leaves pictures.
    """
    torch.manual_seed(1)
    vae = new_vae()
    assert vae.quant_conv is not None
    with torch.no_grad():  # start with almost no noise: with unit variance, the decoder learns nothing
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -6
    world, leaves = pictures(work, "world", count), pictures(work, "leaves", count // 5)
    model = Autoencoder(vae)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([1, step])
        from_leaves = plan.batch // 4
        batch = [world[i] for i in rng.integers(0, len(world), plan.batch - from_leaves)]
        batch += [leaves[i] for i in rng.integers(0, len(leaves), from_leaves)]
        x = to_tensor(np.stack([picture[:, :: rng.choice((-1, 1))] for picture in batch]))
        noise = torch.randn(len(x), 4, 16, 16, generator=torch.Generator().manual_seed(step))
        with autocast():
            y, mean, logvar = model(x.contiguous(), noise)
        error = y.float() - x
        kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
        total: Tensor = error.square().mean() + 0.05 * error.abs().mean() + 1e-5 * kl
        return total

    fit("vae", model, loss, plan, work, f"{count} pictures")
    return vae
