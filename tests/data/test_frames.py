"""How pictures are cut: buckets of about equal area, whole multiples, and what is told of it."""

import math

import numpy as np
import pytest
from PIL import Image

from diffgraft.data.frames import Crop, RandomCrops, bucket_sizes, frames, with_mirrored
from diffgraft.data.settings import Buckets
from diffgraft.errors import DiffgraftError

ON = Buckets(use=True)
SQUARE = Buckets()


def test_buckets_are_those_of_stable_diffusion_15_at_512() -> None:
    """Multiples of 64 from 256 to 1024 of at most 512² pixels, none of which could be higher."""
    found = bucket_sizes(512, ON, 64)
    assert len(found) == len(set(found))
    assert (512, 512) in found
    assert {(width, height) for height, width in found} == set(found)
    for width, height in found:
        assert width % 64 == height % 64 == 0
        assert width * height <= 512 * 512
        assert 256 <= min(width, height) <= max(width, height) <= 1024
    assert {(256, 1024), (320, 768), (384, 640), (448, 576), (512, 512)} <= set(found)


@pytest.mark.parametrize(
    ("side", "step", "least", "most"), [(64, 8, None, None), (1024, 32, 512, 2048), (100, 8, 40, 200)]
)
def test_buckets_keep_to_what_is_set(side: int, step: int, least: int | None, most: int | None) -> None:
    settings = Buckets(use=True, min=least, max=most)
    for size in bucket_sizes(side, settings, step):
        assert all(edge % step == 0 for edge in size)
        assert math.prod(size) <= side * side
        assert (least or side // 2) <= min(size)
        assert max(size) <= (most or 2 * side)


@pytest.mark.parametrize("original", [(300, 200), (200, 300), (50, 400), (1, 1), (4000, 3000), (641, 640)])
def test_a_picture_goes_into_the_bucket_nearest_in_shape(original: tuple[int, int]) -> None:
    (found,) = frames(original, 512, ON, 8)
    shape = original[0] / original[1]
    off = {size: abs(math.log(shape / (size[0] / size[1]))) for size in bucket_sizes(512, ON, 64)}
    assert off[found.size] == pytest.approx(min(off.values()), abs=1e-9)
    assert all(whole >= cut for whole, cut in zip(found.scaled, found.size, strict=True))
    assert any(whole == cut for whole, cut in zip(found.scaled, found.size, strict=True))
    assert 0 < found.fraction_of_picture <= 1


def test_small_pictures_are_not_enlarged_where_that_is_off() -> None:
    settings = Buckets(use=True, step=8, min=16, upscale=False)
    (small,) = frames((70, 45), 128, settings, 8)
    assert small.size == (64, 40)
    assert max(small.scaled[0] / 70, small.scaled[1] / 45) <= 1
    (large,) = frames((700, 450), 128, settings, 8)
    assert math.prod(large.size) > 100 * 100
    (up,) = frames((70, 45), 128, Buckets(use=True, step=8), 8)
    assert up.size[0] > 100


def test_without_buckets_pictures_are_squares() -> None:
    (found,) = frames((300, 200), 64, SQUARE, 8)
    assert found == Crop((300, 200), (96, 64), (16, 0), (64, 64))
    assert found.size_conditioning() == ((200, 300), (0, 16), (64, 64), None)


def test_random_cuts_are_the_pictures_own_and_stay_inside() -> None:
    found = frames((300, 200), 64, SQUARE, 8, RandomCrops(5, seed=77))
    assert 2 <= len(found) <= 5
    assert found == frames((300, 200), 64, SQUARE, 8, RandomCrops(5, seed=77))
    assert found != frames((300, 200), 64, SQUARE, 8, RandomCrops(5, seed=78))
    assert all(0 <= one.corner[0] <= 32 and one.corner[1] == 0 for one in found)
    assert len(frames((64, 64), 64, SQUARE, 8, RandomCrops(5, seed=77))) == 1


def test_random_crops_without_zoom_are_the_ones_of_cached_latents() -> None:
    corners = [frame.corner for frame in frames((300, 200), 64, SQUARE, 8, RandomCrops(4, seed=77))]
    rng = np.random.default_rng([77, 11])
    assert corners == list(dict.fromkeys((int(rng.integers(33)), int(rng.integers(1))) for _ in range(4)))


def test_random_crops_zoom_in_as_far_as_their_scale_says() -> None:
    found = frames((300, 200), 64, SQUARE, 8, RandomCrops(400, scale=0.8, seed=3))
    shares = np.array([64 / frame.scaled[1] for frame in found])  # side of the crop as a share of the picture's height
    assert len(found) > 300
    assert 0.8 - 0.01 <= shares.min() < 0.83
    assert 0.97 < shares.max() <= 1
    assert abs(shares.mean() - 0.9) < 0.01
    for frame in found:
        assert frame.size == (64, 64)
        assert all(0 <= at <= side - 64 for at, side in zip(frame.corner, frame.scaled, strict=True))
        assert abs(frame.scaled[0] / frame.scaled[1] - 1.5) < 0.02
    assert len({frame.corner for frame in frames((64, 64), 64, SQUARE, 8, RandomCrops(9, scale=0.8))}) > 5


def test_what_is_shown_is_that_part_of_the_scaled_picture() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).resize((300, 200), Image.Resampling.BICUBIC)
    frame = Crop((300, 200), (96, 64), (20, 0), (64, 64))
    wanted = image.resize((96, 64), Image.Resampling.LANCZOS).crop((20, 0, 84, 64))
    found = np.asarray(frame.crop(image)).astype(int)
    assert np.abs(found - np.asarray(wanted).astype(int)).max() <= 1
    plain, turned = with_mirrored([frame])
    assert plain == frame
    assert np.array_equal(np.asarray(turned.crop(image)), np.asarray(frame.crop(image))[:, ::-1])


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        (Buckets(use=True, step=20), "buckets.step=20: must be a multiple of 8"),
        (Buckets(use=True, min=100), "exclude squares of the resolution, 64"),
        (Buckets(use=True, max=40), "exclude squares of the resolution, 64"),
    ],
)
def test_buckets_that_cannot_be_are_told(settings: Buckets, answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        frames((30, 20), 64, settings, 8)
