"""Sizes come from the headers of files, and are those of what is decoded, however the camera was turned."""

import io
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from diffgraft.data.pictures import Picture, UnreadablePictureError, read_picture

SIZE = (30, 20)


def png(image: Image.Image, turned: int, where: str) -> bytes:
    """A PNG whose note of how the camera was turned stands before its pixels or behind them."""
    plain, noted = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = turned
    image.save(plain, "PNG")
    if where == "before":
        image.save(noted, "PNG", exif=exif)
        return noted.getvalue()
    content = exif.tobytes()[6:]
    chunk = len(content).to_bytes(4, "big") + b"eXIf" + content + zlib.crc32(b"eXIf" + content).to_bytes(4, "big")
    whole = plain.getvalue()
    return whole[:-12] + chunk + whole[-12:]


@pytest.mark.parametrize("turned", [0, 1, 3, 5, 6, 8, 9, 99])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP", "AVIF", "PNG before", "PNG behind"])
def test_sizes_are_those_of_what_is_decoded(tmp_path: Path, kind: str, turned: int) -> None:
    image, exif, file = Image.new("RGB", SIZE, (9, 90, 200)), Image.Exif(), tmp_path / "a"
    exif[0x0112] = turned
    if kind.startswith("PNG"):
        file.write_bytes(png(image, turned, kind.split()[1]))
    else:
        image.save(file, kind, exif=exif)
    found = Picture("a", file.read_bytes, file=file)
    assert found.size == found.image.size == (SIZE[::-1] if 5 <= turned <= 8 else SIZE)
    assert Picture("a", file.read_bytes).size == found.size


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP", "AVIF", "BMP", "GIF", "PNG", "PNG before", "PNG behind"])
def test_no_pixel_is_decoded_for_a_size(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    if " " in kind:
        file.write_bytes(png(Image.new("RGB", SIZE), 6, kind.split()[1]))
    else:
        Image.new("RGB", SIZE).save(file, kind)
    decoded: list[str] = []

    def load(image: ImageFile.ImageFile) -> None:
        decoded.append(str(image.format))
        raise OSError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    found = Picture("a", file.read_bytes, file=file)
    assert (found.size, found.is_animated, found.has_mask) == (SIZE[::-1] if " " in kind else SIZE, False, False)
    assert decoded == []


def test_a_file_is_not_read_whole_for_a_size(tmp_path: Path) -> None:
    """Ten thousand photographs are some thirty gigabytes."""
    Image.effect_noise((900, 700), 90).save(tmp_path / "a.jpg", quality=95)
    whole = (tmp_path / "a.jpg").read_bytes()
    asked: list[str] = []

    def read() -> bytes:
        asked.append("whole")
        return whole

    found = Picture("a.jpg", read, file=tmp_path / "a.jpg")
    assert (found.size, found.is_animated, found.has_mask) == ((900, 700), False, False)
    assert asked == []


def test_a_program_is_not_run_for_a_picture_of_another_kind(tmp_path: Path) -> None:
    """Pillow would hand PostScript to another program, whatever the file is called."""
    Image.new("RGB", SIZE).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(UnreadablePictureError, match=r"a\.jpg .*of no known format"):
        read_picture(tmp_path / "a.jpg")


def test_unreadable_pictures_are_told_of_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    picture = Picture("own/a.png", (tmp_path / "a.png").read_bytes)
    for ask in (lambda: picture.image, lambda: picture.size, picture.mask):
        with pytest.raises(UnreadablePictureError, match=r"own/a\.png cannot be read as a picture") as told:
            ask()
        assert "BytesIO" not in str(told.value)
    Image.new("RGB", SIZE).save(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(UnreadablePictureError, match=r"b\.png .*more than .* million pixels"):
        read_picture(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    assert read_picture(tmp_path / "b.png").size == SIZE  # Pillow warns of these, and cameras have them
