"""Dynamic thresholding, the second pass of a hires fix, and what an inpainting denoiser is told."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffgraft.bases import Base, load_base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.enlarge import enlarged, hires_size
from diffgraft.generation.guided import Guidance, GuidedDenoiser, with_range_of
from diffgraft.generation.image_input import ImageInput, first_step, inpainting_channels
from diffgraft.generation.latents import decode, encode
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings, Hires
from tests.conftest import small
from tests.generation.test_session import pixels

STEPS = DrawSettings(steps=4)


@pytest.mark.parametrize("percentile", [1.0, 0.8])
def test_dynamic_thresholding_is_its_formula(percentile: float) -> None:
    """In float64 numpy, channel by channel."""
    rng = np.random.default_rng(0)
    guided, goal = rng.normal(size=(3, 4, 5)) * 9 + 2, rng.normal(size=(3, 4, 5))
    wanted = np.empty_like(guided)
    for channel in range(3):
        mean = guided[channel].mean()
        centred = guided[channel] - mean
        limit = np.abs(goal[channel] - goal[channel].mean()).max()
        most = max(limit, np.quantile(np.abs(centred), percentile))
        wanted[channel] = np.clip(centred, -most, most) / most * limit + mean
    found = with_range_of(torch.tensor(guided), torch.tensor(goal), percentile)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


def test_guidance_mimics_a_smaller_one(base: Base) -> None:
    guide = Session(base).painter.guide("a dog", STEPS)
    x = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(1)) * 3

    def predict(guidance: Guidance) -> torch.Tensor:
        return GuidedDenoiser(base, [guide], guidance)(x, 3.0)

    assert torch.equal(predict(Guidance(5.0)), predict(Guidance(5.0, mimic=None, percentile=0.5)))
    torch.testing.assert_close(predict(Guidance(5.0, mimic=5.0)), predict(Guidance(5.0)), rtol=1e-4, atol=1e-4)
    assert (predict(Guidance(9.0, mimic=3.0)) - predict(Guidance(9.0))).abs().max() > 0.1


def test_a_second_pass_starts_from_the_enlarged_first(base: Base) -> None:
    hires = Hires(1.5, 0.5, 6, "lanczos")
    with Session(base) as session:
        (first,) = session.draw("a dog", [3], STEPS)
        (drawn,) = session.draw("a dog", [3], replace(STEPS, hires=hires))
        source = ImageInput(first.resize((96, 96), Image.Resampling.LANCZOS), 0.5)
        (wanted,) = session.draw("a dog", [3], replace(STEPS, steps=6, size=(96, 96)), source)
    assert drawn.size == (96, 96)
    assert np.abs(pixels([drawn]) - pixels([wanted])).max() <= 2


def test_changes_count_on_in_the_second_pass(base: Base) -> None:
    settings = replace(STEPS, hires=Hires(1.5, 0.9, 0, "latent bicubic"))
    with Session(base) as session:
        plain, later, never = (
            pixels(session.draw(f"a {word}", [3], settings)) for word in ("dog", "[dog:cat:1.5]", "[dog:cat:2.0]")
        )
    assert np.array_equal(plain, never)
    assert np.abs(plain - later).mean() > 0.1


@pytest.mark.parametrize("upscaler", ["latent", "latent nearest", "latent bicubic", "latent antialiased"])
def test_latents_are_enlarged_and_keep_their_mean(upscaler: str, base: Base) -> None:
    latents = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(1))
    size = hires_size(base, (40, 24), Hires(1.9))
    assert size == (80, 48)
    found = enlarged(base, latents, size, upscaler)  # type: ignore[arg-type]
    assert found.shape == (2, 4, 12, 20)
    torch.testing.assert_close(found.mean((2, 3)), latents.mean((2, 3)), rtol=0.3, atol=0.1)


def test_pictures_are_enlarged_between_decoding_and_encoding(base: Base) -> None:
    latents = encode(base, [Image.effect_mandelbrot((40, 24), (-2, -1.5, 1, 1.5), 50).convert("RGB")])
    found = enlarged(base, latents, (80, 48), "nearest")
    wanted = encode(base, [decode(base, latents[0]).resize((80, 48), Image.Resampling.NEAREST)])
    assert torch.equal(found, wanted)


def test_an_inpainting_denoiser_gets_mask_and_hidden_picture(tmp_path: Path) -> None:
    held = load_base(small(tmp_path / "model", "sd1", channels=9))
    photo = Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, 32, 48))
    told = inpainting_channels(held, ImageInput(photo, 1.0, mask))
    assert told is not None
    factor = held.vae_scale_factor
    assert told.shape == (1, 5, 48 // factor, 64 // factor)
    half = 32 // factor
    assert (told[:, 0, :, :half] == 1).all()
    assert (told[:, 0, :, half:] == 0).all()
    hidden = photo.copy()
    hidden.paste((128, 128, 128), (0, 0, 32, 48))
    assert torch.equal(told[:, 1:], encode(held, [hidden]))
    assert inpainting_channels(held, ImageInput(photo)) is None
    assert inpainting_channels(load_base("tiny"), ImageInput(photo, 1.0, mask)) is None


def test_steps_from_a_picture_are_those_of_webui(base: Base) -> None:
    found = {denoise: 20 - first_step(denoise, 20) for denoise in (0.01, 0.5, 0.75, 1.0)}
    assert found == {0.01: 1, 0.5: 11, 0.75: 16, 1.0: 20}
    with pytest.raises(DiffgraftError, match="begins with noise: leave out hires"):
        Session(base).draw("x", [1], replace(STEPS, hires=Hires()), ImageInput(Image.new("RGB", (64, 64))))
