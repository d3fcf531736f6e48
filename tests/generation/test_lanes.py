"""Adapters of single pictures of a batch, and of regions of a picture."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.method import Spec
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base
from diffgraft.bases.layers import choose_layers
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from diffgraft.generation.guided import Area, Guidance, GuidedDenoiser
from diffgraft.generation.lanes import LaneError, Lanes
from diffgraft.generation.regions import Region
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from tests.adapters.toys import shake
from tests.generation.test_session import bits, pixels, same
from tests.recipes import ON_PICTURES

FEW = DrawSettings(steps=3)


def made(base: Base, method: str, seed: int = 0, **options: Any) -> Adapter:
    """An adapter of any method on all of its layers, with random values."""
    kind = get_method(method)
    read = kind.read_options(options)
    paths = {"unet": choose_layers("unet", base.unet, kind.layers_under(read))}
    live = kind.attach(base, Spec(paths, 2, 2.0, seed, read, f"<z{seed}>", "dog"))
    torch.manual_seed(seed)
    shake(live, size=0.05)
    adapter = live.adapter({"method": method})
    live.detach()
    return adapter


@pytest.fixture
def library(base: Base, tmp_path: Path) -> Path:
    for name, method, seed in (("a", "lora", 1), ("b", "locon", 2), ("c", "loha", 3), ("d", "full", 4)):
        made(base, method, seed).save(tmp_path / f"{name}.safetensors")
    made(base, "lora", 5, dora=True).save(tmp_path / "e.safetensors")
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*does not change M00")
@pytest.mark.parametrize("method", [name for name in ON_PICTURES if name != "student"])
def test_each_row_gets_what_graft_merges_for_it(method: str, base: Base) -> None:
    """On a denoiser with one adapter merged already; the second row has no lane."""
    first, second = (made(base, method, seed) for seed in (1, 2))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 8, 10, generator=generator)
    states = base.condition(["a dog", "a cat", "a bird"])
    times = torch.tensor([700, 200, 400])

    @torch.no_grad()
    def predict() -> torch.Tensor:
        return base.denoise(latents, times, states)

    lanes = Lanes("unet", base.unet)
    with graft(base, {made(base, "lora", 7): 1.0}):
        plain = predict()
        with graft(base, {first: 0.7}):
            of_first = predict()
        with graft(base, {second: {"unet": 1.5, "M00": 0.0}}):
            of_second = predict()
        try:
            lanes.set([[(first, 0.7)], [(second, {"unet": 1.5, "M00": 0.0})]])
        except LaneError:
            assert first.networks
            return
        lanes.rows = [0, 1, -1]
        predict()  # rows may change from pass to pass
        lanes.rows = [1, -1, 0]
        found = predict()
        lanes.remove()
        assert torch.equal(predict(), plain)
    wanted = torch.stack([of_second[0], plain[1], of_first[2]])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if method not in ("textual-inversion",):
        assert (wanted - plain)[[0, 2]].abs().max() > 1e-3


def test_a_batch_of_different_adapters_is_what_each_is_alone(base: Base, library: Path) -> None:
    before = bits(base)
    prompts = [
        "a dog <lora:a:1>",
        "a dog <lora:b:0.5:2>",
        "a (cat:1.2) <lora:c:1:lbw=M00> <lora:a:0.3>",
        "a dog",
        "a dog <lora:e:0.8>",
        "a dog <lora:a:1@0,0@0.5>",
    ]
    with Session(base, library) as session:
        session.use("b", 0.2, "everywhere")
        together = pixels(session.draw_each(prompts, range(6), FEW))
        alone = np.concatenate([pixels(session.draw(text, [seed], FEW)) for seed, text in enumerate(prompts)])
        swapped = pixels(session.draw_each(prompts[::-1], range(6), FEW))
    assert np.abs(together - alone).max() <= 2
    assert all(np.abs(swapped[row] - together[row]).max() > 2 for row in range(6))
    assert same(bits(base), before)


def test_what_cannot_share_a_batch_is_drawn_in_turn(base: Base, library: Path) -> None:
    """A hypernetwork acts on all rows."""
    made(base, "hypernetwork", 6).save(library / "h.safetensors")
    prompts = ["a dog <hypernet:h:1>", "a dog <lora:a:1>", "a dog <hypernet:h:1>"]
    with Session(base, library) as session:
        together = pixels(session.draw_each(prompts, [3, 3, 4], FEW))
        alone = np.concatenate(
            [pixels(session.draw(text, [seed], FEW)) for text, seed in zip(prompts, [3, 3, 4], strict=True)]
        )
    assert np.abs(together - alone).max() <= 2


def test_a_region_is_drawn_by_its_own_prompt_and_adapters(base: Base, library: Path) -> None:
    """With guidance off each place of the first step is the prediction of its own region alone."""
    settings = DrawSettings(steps=1, guidance=1.0, size=(96, 64))
    with Session(base, library) as session:
        left = Region("a cat <lora:a:2>", (0, 0, 0.5, 1), alone=0)
        right = Region("a bird <lora:d:1>", (0.5, 0, 1, 1), alone=0)
        latents: dict[str, torch.Tensor] = {}

        def kept(name: str, prompt: str, **more: Any) -> None:
            import diffgraft.generation.session as module

            held = module.decode
            try:
                module.decode = lambda _base, row, *_: latents.update({name: row}) or Image.new("RGB", (96, 64))
                session.draw(prompt, [3], replace(settings, **more))
            finally:
                module.decode = held

        kept("both", "a dog", regions=(left, right))
        kept("left", "a cat <lora:a:2>")
        kept("right", "a bird <lora:d:1>")
        kept("plain", "a dog")
        kept("half", "a dog", regions=(left,))
        kept("mixed", "a dog", regions=(replace(left, box=(0, 0, 1, 1), weight=3.0), replace(right, box=(0, 0, 1, 1))))
    half = latents["both"].shape[-1] // 2
    close = {"rtol": 1e-3, "atol": 2e-3}  # noise of σ = 4,096 was subtracted
    torch.testing.assert_close(latents["both"][..., :half], latents["left"][..., :half], **close)
    torch.testing.assert_close(latents["both"][..., half:], latents["right"][..., half:], **close)
    torch.testing.assert_close(latents["half"][..., half:], latents["plain"][..., half:], **close)
    torch.testing.assert_close(latents["mixed"], 0.75 * latents["left"] + 0.25 * latents["right"], **close)
    assert (latents["left"] - latents["plain"]).abs().mean() > 0.01


def test_a_region_alone_is_a_picture_of_its_own(base: Base) -> None:
    """Half a picture of twice the width is, to the last bits, what the base draws at half the width."""
    half = Region("a bird", (0.5, 0, 1, 1), alone=1)
    guide = Session(base).painter.guide("a bird", FEW)
    area = Area(half.area(16, 32), guide, 3.0)
    assert area.window(2) == (slice(0, 16), slice(16, 32))
    assert area.window(3) is None
    x = torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(1)) * 3
    whole = replace(Session(base).painter.guide("a dog", FEW), areas=[area])
    found = GuidedDenoiser(base, [whole], Guidance(3.0))(x, 3.0)
    wanted = GuidedDenoiser(base, [guide], Guidance(3.0))(x[..., 16:].contiguous(), 3.0)
    torch.testing.assert_close(found[..., 16:], wanted, rtol=1e-4, atol=1e-4)
    odd = Area(Region("x", (0.3, 0.1, 0.6, 0.2)).area(13, 30), guide, 1.0)
    assert odd.window(0) == (slice(0, 8), slice(8, 24))


def test_the_area_of_a_region() -> None:
    found = Region("x", (0.25, 0.0, 0.625, 0.5), weight=2.0).area(4, 4)
    assert found.shape == (1, 4, 4)
    assert found[0, :2].tolist() == [[0, 2, 1, 0]] * 2
    assert not found[0, 2:].any()
    mask = Image.new("L", (8, 4))
    mask.paste(255, (0, 0, 4, 4))
    assert Region("x", mask=mask).area(2, 4)[0].tolist() == [[1, 1, 0, 0]] * 2


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"box": (0.5, 0, 0.5, 1)}, r"Invalid region 0.5,0,0.5,1: left, top, right and bottom must be shares"),
        ({"box": (0, 0, 2, 1)}, "shares from 0 to 1"),
        ({"box": (0, 1)}, "must be left, top, right and bottom"),
        ({"alone": 2}, "alone=2 of a region: must be from 0 to 1"),
        ({"weight": 0}, "weight=0 of a region: must be above 0"),
    ],
)
def test_regions_that_cannot_be(given: dict[str, Any], answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        Region("x", **given)
