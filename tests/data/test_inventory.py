"""What a folder of pictures holds is accounted for: learnt from, or named, or refused with both of its readings."""

import unicodedata
import warnings
from pathlib import Path

import pytest
from PIL import Image

from diffgraft.data.image_folder import read_folder
from diffgraft.data.inventory import detect_layout, take_inventory
from diffgraft.errors import DiffgraftError
from tests.data.test_image_folder import picture


def text(path: Path, said: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(said, "utf-8")
    return path


def test_pictures_beside_a_numbered_folder_can_be_read_in_two_ways(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "2023_holiday/z.png"):
        picture(tmp_path / name)
    with pytest.raises(DiffgraftError, match=r"two ways: as the 2 pictures in it \(a.png, b.png\).*2023_holiday \(1 x"):
        detect_layout(tmp_path)
    assert detect_layout(tmp_path, "flat").folders == []
    (only,) = detect_layout(tmp_path, "kohya").folders
    assert (only.folder.name, only.repeats, only.prompt) == ("2023_holiday", 2023, "holiday")
    said = " ".join(detect_layout(tmp_path, "kohya").remarks)
    assert "2 pictures in" in said
    assert "2 in the folder itself" in said
    assert "2,023 repeats" in said
    with pytest.warns(UserWarning, match=r"1 picture in subfolders of .* is not used: 1 in 2023_holiday/"):
        assert [one.name for one in read_folder(tmp_path)] == ["a.png", "b.png"]


def test_a_picture_beside_img_is_a_conflict_as_well(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "3_sks dog" / "a.png")
    picture(tmp_path / "img" / "stray.png")
    with pytest.raises(DiffgraftError, match=r"two ways.*stray\.png"):
        detect_layout(tmp_path)


@pytest.mark.parametrize("beside", ["0_unused", "reg", "plain/deep"])
def test_what_lies_beside_numbered_folders_is_counted(tmp_path: Path, beside: str) -> None:
    picture(tmp_path / "3_sks dog" / "a.png")
    for name in ("b.png", "c.png"):
        picture(tmp_path / beside / name)
    (said,) = detect_layout(tmp_path).remarks
    assert said.startswith(f"2 pictures in {tmp_path} are not used")
    assert f"2 in {beside.partition('/')[0]}/" in said
    assert detect_layout(tmp_path, used=[tmp_path / beside]).remarks == []


def test_a_table_above_numbered_folders_can_be_read_in_two_ways(tmp_path: Path) -> None:
    picture(tmp_path / "3_sks dog" / "a.png")
    text(tmp_path / "metadata.jsonl", '{"file_name": "3_sks dog/a.png", "text": "a sks dog runs"}\n')
    with pytest.raises(DiffgraftError, match=r"two ways: as the pictures that metadata\.jsonl names, or in kohya's"):
        detect_layout(tmp_path)
    (said,) = detect_layout(tmp_path, "kohya").remarks
    assert said.startswith(f"{tmp_path / 'metadata.jsonl'} is not read")
    assert [one.captions for one in read_folder(tmp_path)] == [("a sks dog runs",)]


def test_a_number_that_is_no_count_of_repeats_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "20231224_holiday" / "a.png")
    with pytest.raises(DiffgraftError, match=r"20,231,224 repeats of each picture, but at most 100,000"):
        detect_layout(tmp_path)


def test_a_caption_in_utf_16_without_a_mark_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("a sks dog".encode("utf-16-le"))
    with pytest.raises(DiffgraftError, match=r"a\.txt is not UTF-8, as it contains NUL bytes"):
        read_folder(tmp_path)


def test_a_numbered_folder_without_pictures_takes_nothing_over(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    text(tmp_path / "10_sks dog" / "notes.txt", "none yet")
    assert detect_layout(tmp_path).folders == []
    assert [one.name for one in read_folder(tmp_path)] == ["a.png"]
    with pytest.raises(DiffgraftError, match=r"layout=kohya is set, but .* no numbered folder"):
        detect_layout(tmp_path, "kohya")


def test_every_format_that_is_read_is_learnt_and_others_are_named(tmp_path: Path) -> None:
    names = ["a.jpg", "b.JPEG", "c.bmp", "d.gif", "e.tiff", "f.avif", "g.jfif", "h.webp", "i.png", "j.jp2", "k.ppm"]
    for number, name in enumerate(names):
        size = (30 + number, 20)
        Image.new("RGB", size, (9, 99, 200)).save(tmp_path / name, format="JPEG" if name.endswith("jfif") else None)
    for name in ("x.heic", "y.JXL"):
        (tmp_path / name).write_bytes(b"something")
    (tmp_path / "._a.jpg").write_bytes(b"what macOS leaves")
    with pytest.warns(UserWarning, match=r"2 files .* of an unsupported format and not used: x\.heic, y\.JXL") as seen:
        found = read_folder(tmp_path)
    assert len(seen) == 1
    assert [one.name for one in found] == names
    assert [one.size for one in found] == [one.image.size for one in found] == [(30 + n, 20) for n in range(len(names))]


def test_pictures_that_their_names_hide_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.webp", "d.gif"):
        picture(tmp_path / name)
    for name, other in (("a.png", "noname"), ("c.webp", "photo.jpg_large"), ("d.gif", "e.gif!small")):
        (tmp_path / name).rename(tmp_path / other)
    (tmp_path / "f.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "notes.md").write_text("nothing", "utf-8")
    with pytest.warns(UserWarning, match=r"hold a picture|is broken") as told:
        assert [one.name for one in read_folder(tmp_path)] == ["b.jpg"]
    said = [str(one.message) for one in told]
    assert any(text.startswith("e.gif!small, noname, photo.jpg_large hold a picture, but are not") for text in said)
    assert f"1 link in {tmp_path} is broken: f.png." in said
    assert len(said) == 2


def test_a_link_in_circles_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    with pytest.raises(DiffgraftError, match=r"b\.png is a link that cannot be followed"):
        read_folder(tmp_path)


@pytest.mark.parametrize("name", ["a_MASK.png", "a-MaskLabel.png", "a.jpg_mask.png", "A_mask.png"])
def test_a_mask_is_known_whatever_the_case_of_its_name(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / name)
    found = take_inventory(tmp_path)
    assert [path.name for path in found.pictures] == ["a.jpg"]
    assert {one.name: mask.name for one, mask in found.masks.items()} == {"a.jpg": name}
    assert found.remarks == []


def test_pictures_that_are_called_as_masks_are_elsewhere_are_told(tmp_path: Path) -> None:
    for name in ("a.jpg", "a-mask.png", "a.alpha.png", "bigmask.png"):
        picture(tmp_path / name)
    (said,) = take_inventory(tmp_path).remarks
    assert said.startswith("a-mask.png, a.alpha.png are used as pictures")


def test_moving_pictures_are_told_of(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (30, 20), (shade, 0, 0)) for shade in (0, 90, 200)]
    for name in ("a.gif", "b.png", "c.tiff", "d.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    picture(tmp_path / "e.png")
    with pytest.warns(UserWarning, match=r"files with several is used: a\.gif, b\.png, c\.tiff and 1 more") as seen:
        read_folder(tmp_path)
    assert len(seen) == 1


def test_captions_are_found_under_all_their_names(tmp_path: Path) -> None:
    names = ("a.png", "b.png", "c.png", "d.PNG", "e.png", unicodedata.normalize("NFC", "café") + ".png")
    for name in names:
        picture(tmp_path / name)
    text(tmp_path / "a.caption", "of sd-scripts")
    text(tmp_path / "b.TXT", "in capitals")
    text(tmp_path / "c.png.txt", "after the whole name")
    text(tmp_path / "D.txt", "of Windows")
    text(tmp_path / (unicodedata.normalize("NFD", "café") + ".txt"), "of macOS")
    text(tmp_path / "e.txt", "the first")
    text(tmp_path / "e.caption", "the first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {unicodedata.normalize("NFC", one.name): one.caption for one in read_folder(tmp_path)}
    assert [found[name] for name in names] == [
        "of sd-scripts", "in capitals", "after the whole name", "of Windows", "the first", "of macOS",
    ]  # fmt: skip


def test_captions_that_are_not_used_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    text(tmp_path / "a.txt", " \n")
    text(tmp_path / "b.txt", "one thing")
    text(tmp_path / "b.caption", "another")
    text(tmp_path / "gone.txt", "of no picture")
    text(tmp_path / "c.json", '{"caption": "in JSON"}')
    text(tmp_path / "captions.csv", "a,b")
    said = take_inventory(tmp_path).remarks
    wanted = ["1 caption is empty (a.txt)", "not used: b.caption", "1 text file belongs to no picture: gone.txt"]
    wanted += ["Captions are not read from c.json", "captions.csv in"]
    assert len(said) == len(wanted)
    for text_of, part in zip(said, wanted, strict=True):
        assert part in text_of
    with warnings.catch_warnings(action="ignore"):
        assert [one.captions for one in read_folder(tmp_path)] == [(), ("one thing",), ()]


@pytest.mark.parametrize("name", ["gone_mask.png", "gone-masklabel.png", "gone-condlabel.png", "gone_mask.jpg"])
def test_masks_of_no_picture_are_not_learnt_from(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / name)
    with pytest.warns(UserWarning, match=f"not used: {name}"):
        assert [one.name for one in read_folder(tmp_path)] == ["a.png"]


def test_masks_are_found_whatever_their_format(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "a_mask.JPG")
    picture(tmp_path / "b.jpg")
    picture(tmp_path / "B_mask.png")
    picture(tmp_path / "b-masklabel.png")
    with pytest.warns(UserWarning, match="Only one mask of a picture is used; not used: b-masklabel.png"):
        found = read_folder(tmp_path)
    assert [(one.name, one.mask_file and one.mask_file.name) for one in found] == [
        ("a.png", "a_mask.JPG"),
        ("b.jpg", "B_mask.png"),
    ]


def test_links_lead_out_of_a_folder_only_where_that_is_meant(tmp_path: Path) -> None:
    picture(tmp_path / "secret" / "x.png")
    text(tmp_path / "secret" / "x.txt", "a secret")
    picture(tmp_path / "own" / "a.png")
    (tmp_path / "own" / "b.png").symlink_to("a.png")
    assert len(read_folder(tmp_path / "own")) == 2
    for name in ("c.png", "a_mask.png"):
        (tmp_path / "own" / name).symlink_to(tmp_path / "secret" / "x.png")
        with pytest.raises(DiffgraftError, match=rf"{name} is a file outside of .*x\.png.*outside=true"):
            read_folder(tmp_path / "own")
        assert len(read_folder(tmp_path / "own", outside=True)) == (3 if name == "c.png" else 2)
        (tmp_path / "own" / name).unlink()
    (tmp_path / "own" / "a.txt").symlink_to(tmp_path / "secret" / "x.txt")
    with pytest.raises(DiffgraftError, match=r"a\.txt is a file outside of"):
        read_folder(tmp_path / "own")
    (tmp_path / "linked").symlink_to(tmp_path / "own")  # the folder itself may be one
    (tmp_path / "own" / "a.txt").unlink()
    assert len(read_folder(tmp_path / "linked")) == 2


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_table_that_is_a_link_leads_out_of_a_folder_only_where_that_is_meant(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "own" / "a.png")
    rows = {"metadata.csv": "file_name,text\na.png,a secret\n"}
    text(tmp_path / "secret" / name, rows.get(name, '{"file_name": "a.png", "text": "a secret"}\n'))
    (tmp_path / "own" / name).symlink_to(tmp_path / "secret" / name)
    with pytest.raises(DiffgraftError, match=rf"{name} is a file outside of .*outside=true"):
        read_folder(tmp_path / "own")
    assert [one.caption for one in read_folder(tmp_path / "own", outside=True)] == ["a secret"]
