"""UNets of nine channels, made for inpainting: loaded, trained, drawn with, and written as one file."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from diffgraft.bases import load_base, loading
from diffgraft.generation.graft import graft
from diffgraft.generation.image_input import ImageInput
from diffgraft.generation.merge_checkpoint import merge_checkpoint
from diffgraft.generation.settings import DrawSettings
from diffgraft.trainers.run.train import train
from tests.conftest import small
from tests.drawing import generate
from tests.recipes import SUBJECT


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_from_a_folder_and_from_one_file(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = load_base(small(tmp_path / "model", family, channels=9))
    assert held.family.name == family
    assert "inpainting" in repr(held)
    assert held.denoiser_input(torch.zeros(2, 4, 6, 8)).shape == (2, 9, 6, 8)
    small(tmp_path / "configs" / family, family)
    monkeypatch.setattr(loading, "CONFIGS", tmp_path / "configs")
    again = load_base(merge_checkpoint(held, {}, tmp_path / "model.safetensors"))
    assert again.is_inpainting
    assert again.hash == held.hash


def test_what_it_is_told_is_to_draw_everything(tmp_path: Path) -> None:
    held = load_base(small(tmp_path / "model", "sd1", channels=9))
    noisy = torch.randn(2, 4, 6, 8)
    given = held.denoiser_input(noisy)
    assert torch.equal(given[:, :4], noisy)
    assert (given[:, 4] == 1).all()
    pipe = held.pipeline()
    mask, latents = pipe.prepare_mask_latents(
        torch.ones(1, 1, 48, 64), torch.zeros(1, 3, 48, 64), 1, 48, 64, torch.float32, held.device, None, False
    )
    assert torch.equal(given[:1, 4:5], mask)
    spread = held.vae.encode(torch.zeros(1, 3, 48, 64)).latent_dist.std * held.vae.config.scaling_factor
    assert ((given[:1, 5:] - latents).abs() < 6 * spread).all()  # diffusers draws a sample, and here is its middle


@pytest.mark.filterwarnings("ignore:.*modules never received a gradient")  # the middle sees one latent
def test_training_and_drawing(pictures: Path, tmp_path: Path) -> None:
    held = load_base(small(tmp_path / "model", "sd1", channels=9))
    settings = {"subject": "dog", "steps": 2, "resolution": 64, "sample_every": 0, "prior": {"images": 2}}
    run = train(SUBJECT, base=held, images=pictures, output=tmp_path / "run", **settings)
    assert len(run.metrics) == 2
    drawn = {}
    photo = Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    mask = Image.new("L", photo.size, 0)
    mask.paste(255, (0, 0, 32, 48))
    for strength in (0.0, 50.0):
        with graft(held, {run.adapter: strength}):
            settings_of = DrawSettings(size=(64, 48), steps=3)
            drawn[strength, "alone"] = generate(held, ["a dog"], settings_of, [1])[0]
            source = ImageInput(photo, denoise=1.0, mask=mask)
            drawn[strength, "into"] = generate(held, ["a dog"], settings_of, [1], image_input=source)[0]
    for kind in ("alone", "into"):
        assert drawn[0.0, kind].size == (64, 48)
        assert drawn[0.0, kind].tobytes() != drawn[50.0, kind].tobytes()
    kept = (40, 0, 64, 48)
    assert drawn[50.0, "into"].crop(kept).tobytes() == photo.crop(kept).tobytes()
