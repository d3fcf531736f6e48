"""Image to image and inpainting: the source's picture goes in, and what should stay stays."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.method import Spec
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.data.image_folder import read_folder
from diffgraft.data.pictures import read_picture
from diffgraft.demo.subject import POODLE
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from diffgraft.generation.image_input import ImageInput
from diffgraft.generation.settings import DrawSettings
from tests.adapters.toys import shake
from tests.drawing import generate
from tests.generation.test_graft import lora
from tests.recipes import ON_PICTURES

PROMPT = "a dog in the snow"


def photo() -> Image.Image:
    return read_folder(POODLE.folder / "learn")[0].image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def draw(base: Base, source: ImageInput | None, steps: int = 8, **settings: object) -> list[Image.Image]:
    return generate(base, [PROMPT] * 2, DrawSettings(steps=steps, **settings), [1, 2], image_input=source)  # type: ignore[arg-type]


def test_the_less_noise_the_nearer_to_the_source(base: Base) -> None:
    source = photo()
    far = [
        np.abs(pixels(draw(base, ImageInput(source, denoise))[0]) - pixels(source)).mean() for denoise in (0.2, 0.6, 1)
    ]
    assert far[0] < far[1] < far[2]
    assert far[0] < 20


def test_it_is_what_the_pipeline_of_diffusers_gives(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    pipe = StableDiffusionImg2ImgPipeline(**base.pipeline().components, requires_safety_checker=False)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    pipe.set_progress_bar_config(disable=True)
    # diffusers encodes a sample, here it is the mean; of eight steps webui takes ⌊0.5 · 8⌋ + 1, diffusers ⌊0.625 · 8⌋
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())  # noqa: ARG005
    generator = torch.Generator().manual_seed(1)
    (wanted,) = pipe(
        PROMPT, photo(), strength=0.625, num_inference_steps=8, guidance_scale=3.0, generator=generator
    ).images
    assert np.abs(pixels(draw(base, ImageInput(photo(), 0.5))[0]) - pixels(wanted)).max() <= 2


def test_inpainting_leaves_the_rest_as_it_was_to_the_pixel(base: Base) -> None:
    source = photo()
    mask = np.zeros((source.height, source.width), np.uint8)
    mask[8:40, 20:60] = 255
    for image in draw(base, ImageInput(source, 0.9, Image.fromarray(mask))):
        changed = np.abs(pixels(image) - pixels(source)).max(-1)
        assert changed[mask == 0].max() == 0
        assert changed[mask == 255].mean() > 5


def test_a_source_keeps_its_shape_and_an_adapter_works_on_it(base: Base) -> None:
    wide = ImageInput(photo().resize((150, 90)), 0.6)
    bare = draw(base, wide)[0]
    assert bare.size == (80, 48)
    with graft(base, {lora(1): 2.0}):
        assert np.abs(pixels(draw(base, wide)[0]) - pixels(bare)).max() > 0
    assert draw(base, wide, size=(64, 48))[0].size == (64, 48)


def trained(base: Base, method: str) -> Adapter:
    """An adapter of any method, its parameters shaken."""
    made = get_method(method)
    options = made.read_options({})
    paths = {"unet": choose_layers("unet", base.unet, made.layers_under(options))}
    live = made.attach(base, Spec(paths, 2, 2.0, 0, options, "<zorp>", "dog"))
    shake(live, size=0.05)
    adapter = live.adapter({"method": method})
    live.detach()
    return adapter


@pytest.mark.parametrize("method", ON_PICTURES)
def test_adapters_of_every_method_work_in_all_pipelines(method: str, base: Base) -> None:
    adapter, mask = trained(base, method), Image.new("L", (64, 64), 255)
    sources = (None, ImageInput(photo(), 0.7), ImageInput(photo(), 0.7, mask))

    def draw_all() -> list[np.ndarray]:
        prompt = "a <zorp> dog"
        return [
            pixels(generate(base, [prompt], DrawSettings(steps=4), [1], image_input=source)[0]) for source in sources
        ]

    bare = draw_all()
    with graft(base, {adapter: 1.0}):
        for before, after in zip(bare, draw_all(), strict=True):
            assert np.abs(after - before).max() > 2
    for before, after in zip(bare, draw_all(), strict=True):
        assert np.array_equal(before, after)


def test_what_is_transparent_in_a_mask_stays(base: Base, tmp_path: Path) -> None:
    source, painted = photo(), np.zeros((64, 64, 4), np.uint8)
    painted[8:40, 20:60] = 255
    mask = Image.fromarray(painted)
    mask.save(tmp_path / "mask.png")
    for given in (mask, read_picture(tmp_path / "mask.png", "black")):
        changed = np.abs(pixels(draw(base, ImageInput(source, 0.9, given))[0]) - pixels(source)).max(-1)
        assert changed[painted[..., 0] == 0].max() == 0
        assert changed[painted[..., 0] == 255].mean() > 5


def test_xl_draws_from_and_into_pictures_too(sdxl_folder: object) -> None:
    small = load_base(str(sdxl_folder))
    mask = Image.new("L", (64, 64), 255)
    for source in (ImageInput(photo(), 0.5), ImageInput(photo(), 0.5, mask)):
        assert generate(small, [PROMPT], DrawSettings(steps=4), [1], image_input=source)[0].size == (32, 32)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (ImageInput(Image.new("RGB", (64, 64)), 0.5, Image.new("L", (64, 64))), "mask is black everywhere"),
        (ImageInput(Image.new("RGB", (64, 64)), 0.5, Image.new("L", (32, 64))), "mask is 32x64 and the picture 64x64"),
    ],
)
def test_sources_that_will_not_do_are_refused(base: Base, source: ImageInput, said: str) -> None:
    with pytest.raises(DiffgraftError, match=said):
        draw(base, source)
