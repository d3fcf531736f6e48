"""Edges of pictures: where they are, how wide, and that weak ones need strong ones."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffgraft.edges import edges


def lines(image: Image.Image) -> np.ndarray:
    found = edges(image)
    assert (found.mode, found.size) == ("RGB", image.size)
    pixels = np.asarray(found)
    assert set(np.unique(pixels)) <= {0, 255}
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0] > 0


def test_a_rectangle_has_one_line_along_each_side() -> None:
    image = Image.new("RGB", (60, 40), "black")
    ImageDraw.Draw(image).rectangle((15, 10, 44, 29), fill="white")
    found = lines(image)
    assert (found[15:25].sum(1) == 2).all()
    assert (found[:, 20:40].sum(0) == 2).all()
    left, right = np.flatnonzero(found[20])
    assert abs(left - 14.5) <= 1
    assert abs(right - 44.5) <= 1


@pytest.mark.parametrize("angle", [0, 20, 45, 70, 90, 135])
def test_a_straight_border_of_any_direction_is_one_line(angle: int) -> None:
    y, x = np.mgrid[:41, :63]
    side = (x - 31) * np.cos(np.radians(angle)) + (y - 20) * np.sin(np.radians(angle)) > 0.3
    found = lines(Image.fromarray((side * 200).astype(np.uint8)))
    inner = found[4:-4, 4:-4]
    assert inner.any()
    distance = np.abs((x - 31) * np.cos(np.radians(angle)) + (y - 20) * np.sin(np.radians(angle)) - 0.3)
    assert distance[found].max() < 1.6
    along = inner.sum(1) if abs(np.sin(np.radians(angle))) < 0.75 else inner.sum(0)
    assert along[along > 0].mean() <= 2  # diagonal lines are stairs


def test_weak_edges_count_where_they_continue_strong_ones() -> None:
    pixels = np.zeros((40, 60), np.uint8)
    pixels[20:, :30] = 120
    pixels[20:, 30:] = 40
    joined = lines(Image.fromarray(pixels))
    assert joined[18:22, 40:55].any(0).all()
    pixels[:, :32] = 0
    assert not lines(Image.fromarray(pixels))[18:22, 45:55].any()


def test_plain_pictures_of_any_size_have_none() -> None:
    for size in ((1, 1), (3, 5), (64, 48)):
        assert not lines(Image.new("RGB", size, (90, 140, 30))).any()
