"""Any folder of pictures: turned, flattened, and made RGB; what cannot be read is named."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffgraft.bases import Base
from diffgraft.data.class_images import class_images
from diffgraft.data.image_folder import read_folder
from diffgraft.data.latents import encode
from diffgraft.data.pictures import crop_to_square, read_picture, upright_rgb
from diffgraft.errors import DiffgraftError
from diffgraft.generation.settings import DrawSettings
from diffgraft.pixels import to_tensor


def gradient(width: int = 30, height: int = 20) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90° clockwise to show
    gradient().save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = upright_rgb(tmp_path / "a.jpg")
    assert image.size == (20, 30)
    wanted = np.asarray(gradient().transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(np.asarray(image).astype(int) - wanted).mean() < 6


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_a_picture_with_damaged_exif_is_read_as_it_lies(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for cut in (9, 12, 17):
        gradient().save(tmp_path / f"{cut}.{kind}", exif=exif.tobytes()[:cut], quality=95)
    found = read_folder(tmp_path)
    assert [picture.image.size for picture in found] == [gradient().size] * 3


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (9, 6), (255, 0, 0, 0))
    image.putpixel((3, 2), (0, 0, 255, 255))
    image.save(tmp_path / "a.png")
    image.quantize(4).save(tmp_path / "palette.png")
    for name in ("a.png", "palette.png"):
        found = upright_rgb(tmp_path / name)
        assert found.getpixel((0, 0)) == (255, 255, 255)
        assert found.getpixel((3, 2)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = gradient().convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    image = deep if mode == "I;16" else grey.convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    found = upright_rgb(path)
    assert found.mode == "RGB"
    if mode != "1":
        assert np.abs(np.asarray(found)[..., 0].astype(int) - np.asarray(grey)).mean() < 4


def test_a_folder_is_read_in_order_with_its_captions(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", "c.webp"):
        gradient().save(tmp_path / name)
    (tmp_path / "a.txt").write_text(" a gradient, red \n", "utf-8")
    (tmp_path / "notes.md").write_text("no picture", "utf-8")
    found = read_folder(tmp_path)
    assert [picture.name for picture in found] == ["a.jpeg", "b.PNG", "c.webp"]
    assert [picture.caption for picture in found] == ["a gradient, red", None, None]


def test_broken_files_are_named_and_skipped(tmp_path: Path) -> None:
    gradient().save(tmp_path / "good.png")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello", "utf-8")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="is left out") as seen:
        found = read_folder(tmp_path)
    assert [picture.name for picture in found] == ["good.png"]
    assert [str(warning.message).split()[0] for warning in seen] == ["empty.jpg", "half.png", "text.png"]


def test_a_folder_without_pictures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DiffgraftError, match="has no picture files"):
        read_folder(tmp_path)
    with pytest.raises(DiffgraftError, match="does not exist"):
        read_folder(tmp_path / "none")
    (tmp_path / "only.jpg").write_bytes(b"broken")
    with pytest.raises(DiffgraftError, match="is a file, not a folder"):
        read_folder(tmp_path / "only.jpg")
    with pytest.warns(UserWarning, match=r"only\.jpg"), pytest.raises(DiffgraftError, match="None of the 1"):
        read_folder(tmp_path)


@pytest.mark.parametrize("size", [(300, 20), (20, 300), (3, 2), (64, 64)])
def test_odd_shapes_become_squares_from_their_middle(size: tuple[int, int]) -> None:
    image = crop_to_square(gradient(*size), 16)
    assert image.size == (16, 16)
    pixels = np.asarray(image).astype(int)
    assert abs(pixels[..., 0].mean() - 127) < 8
    assert abs(pixels[..., 1].mean() - 127) < 8


def test_pixels_run_from_minus_one_to_one() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    tensor = to_tensor([image])
    assert tensor.shape == (1, 3, 2, 3)
    assert tensor[0, :, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])


def test_latents_are_those_of_the_vae(base: Base) -> None:
    import torch

    image = gradient(40, 40)
    found = encode(base, [image], 48)
    assert found.shape(0) == (4, 12, 12)
    with torch.no_grad():
        wanted = base.vae.encode(to_tensor([crop_to_square(image, 48)])).latent_dist
    scale = base.vae.config.scaling_factor
    torch.testing.assert_close(found[0][0], wanted.mean[0] * scale)
    noise = torch.randn(2, 4, 12, 12)
    torch.testing.assert_close(found.sample([0, 0], noise), (wanted.mean + wanted.std * noise) * scale)


def test_class_images_are_drawn_once(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFGRAFT_CACHE", str(tmp_path))
    settings = DrawSettings(steps=2, size=(32, 32))
    first = class_images(base, ["a cat"], 2, settings, 4)
    files = sorted(tmp_path.rglob("*.png"))
    stamps = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 2
    again = class_images(base, ["a cat"], 3, settings, 4)
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert len(sorted(tmp_path.rglob("*.png"))) == 3
    more = class_images(base, ["a dog", "a cat"], 2, settings, 4)
    assert [prompt for prompt, _ in more] == ["a dog", "a dog", "a cat", "a cat"]
    for found in (again[:2], more[2:]):
        for (_, before), (_, after) in zip(first, found, strict=True):
            assert before.read() == after.read()
    assert len(sorted(tmp_path.rglob("*.png"))) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read as Linux gives it")
def test_a_large_picture_of_16_bits_takes_little_more_memory_than_its_rgb_pixels(tmp_path: Path) -> None:
    width, height = 6000, 4000
    values = np.zeros((height, width), np.uint16)
    values[2000:2010, 100:200] = 40_000
    Image.fromarray(values).save(tmp_path / "a.png")
    code = (
        "import resource\nfrom pathlib import Path\nfrom diffgraft.data.pictures import upright_rgb\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        f"before = peak()\nimage = upright_rgb(Path({str(tmp_path / 'a.png')!r}))\n"
        "print(peak() - before, *image.getpixel((150, 2005)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    taken, *pixel = map(int, done.stdout.split())
    assert pixel == [40_000 * 255 // 65_535] * 3
    assert taken < 6.5 * width * height  # of which 4 are the pixels as Pillow keeps them


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 127, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[0.0, 32768.0, 65535.0]], np.float32), [0, 127, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 127, 255]),
        (np.array([[0, 100, 200]], np.uint16), [0, 0, 0]),
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
    ],
)
def test_grey_values_are_scaled_by_the_range_of_their_type(
    values: np.ndarray, expected: list[int], tmp_path: Path
) -> None:
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert [upright_rgb(tmp_path / "a.tiff").getpixel((x, 0)) for x in range(3)] == [(grey,) * 3 for grey in expected]


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_picture_with_values_that_are_not_finite_is_refused(odd: float, tmp_path: Path) -> None:
    values = np.full((4, 6), 100, np.float32)
    values[1, 2] = odd
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(DiffgraftError, match=r"a\.tiff cannot be read .*not finite"):
        read_picture(tmp_path / "a.tiff")
