"""Where pictures and captions come from: folders in the layouts people have, tables, and data sets of `datasets`."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffgraft.data.image_folder import read_folder, read_source
from diffgraft.data.inventory import kohya_folders
from diffgraft.errors import DiffgraftError


def picture(path: Path, colour: int = 0, size: tuple[int, int] = (30, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 90, 200)).save(path)
    return path


def test_a_table_of_json_lines_holds_captions_one_or_several(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "deep/d.png"):
        picture(tmp_path / name)
    rows = [
        {"file_name": "a.png", "text": ["a dog", "a good dog"]},
        {"file_name": "b.png", "text": ["a cat"]},
        {"file_name": "deep/d.png", "text": ["a bird"]},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found = {one.name: one.captions for one in read_folder(tmp_path)}
    assert found == {"a.png": ("a dog", "a good dog"), "b.png": ("a cat",), "c.png": (), "deep/d.png": ("a bird",)}


def test_a_table_of_commas_and_the_text_beside_a_picture_which_comes_first(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "metadata.csv").write_text(
        'file_name,label,caption\na.png,1,"a dog, running"\nb.png,2,a cat\n', "utf-8"
    )
    (tmp_path / "b.txt").write_text("by hand", "utf-8")
    with pytest.warns(UserWarning, match=r"b\.png has a caption in a file and another in the table"):
        assert [one.captions for one in read_folder(tmp_path)] == [("a dog, running",), ("by hand",)]
    with pytest.warns(UserWarning, match=r"b\.png has a caption in a file"):
        assert [one.captions for one in read_source(tmp_path, "label")] == [("1",), ("by hand",)]
    with pytest.raises(DiffgraftError, match="no column 'labels': did you mean 'label'"):
        read_source(tmp_path, "labels")


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("metadata.jsonl", '{"text": "a dog"}\n', "lacks the column file_name"),
        ("metadata.jsonl", '{"file_name": "a.png", "te', "cannot be read as a table"),
        ("metadata.csv", "", "cannot be read as a table"),
    ],
)
def test_a_table_that_will_not_do_is_told(tmp_path: Path, name: str, text: str, answer: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(DiffgraftError, match=answer):
        read_folder(tmp_path)


def test_a_data_set_saved_to_a_folder(tmp_path: Path) -> None:
    from datasets import Dataset
    from datasets import Image as ImageFeature

    files = [str(picture(tmp_path / "in" / f"{n}.png", 40 * n)) for n in range(3)]
    rows = {"id": [1, 2, 3], "photo": files, "caption": ["a dog", None, "a cat"]}
    Dataset.from_dict(rows).cast_column("photo", ImageFeature()).save_to_disk(tmp_path / "saved")
    for file in files:
        Path(file).unlink()  # what was saved holds the pictures themselves
    found = read_source(tmp_path / "saved")
    assert [one.captions for one in found] == [("a dog",), (), ("a cat",)]
    assert [np.asarray(one.image)[0, 0, 0] for one in found] == [0, 40, 80]
    assert len({one.content for one in found}) == 3
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "words")
    with pytest.raises(DiffgraftError, match="no column of images"):
        read_source(tmp_path / "words")


def test_a_data_set_that_nobody_has_is_told() -> None:
    with pytest.raises(DiffgraftError, match="data set no/such-set cannot be read"):
        read_source("no/such-set")


def test_the_hub_is_asked_once_and_not_for_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where it does not answer, what was brought earlier is looked for, and no library tries again and again."""
    import datasets
    from huggingface_hub import HfApi, constants

    asked: list[object] = []

    def dataset_info(_self: HfApi, name: str, *, timeout: float) -> None:
        asked.append((name, timeout))
        raise TimeoutError

    def load_dataset(name: str) -> None:
        asked.append((name, datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))
        raise OSError("nothing")

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for module in (datasets.config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    with pytest.raises(DiffgraftError, match="The data set some/set cannot be read"):
        read_source("some/set")
    assert asked == [("some/set", 5), ("some/set", True, True)]
    assert (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == (False, False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DiffgraftError, match="picture folder data/dogs does not exist"):  # its parent is here
        read_source("data/dogs")
    assert len(asked) == 2


def test_folders_of_kohyas_layout(tmp_path: Path) -> None:
    for name in ("img/10_sks dog/a.png", "img/2_zwx cat/b.png", "img/0_unused/c.png", "log/d.png"):
        picture(tmp_path / name)
    found = kohya_folders(tmp_path)
    assert [(one.folder.name, one.repeats, one.prompt) for one in found] == [
        ("10_sks dog", 10, "sks dog"),
        ("2_zwx cat", 2, "zwx cat"),
    ]
    assert kohya_folders(tmp_path / "img") == found
    assert kohya_folders(tmp_path / "log") == []


def test_masks_lie_beside_pictures_or_in_their_alpha(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    mask = Image.new("L", (60, 40), 0)
    mask.paste(255, (0, 0, 30, 40))
    mask.save(tmp_path / "a_mask.png")
    image = Image.new("RGBA", (30, 20), (9, 9, 9, 255))
    image.paste((9, 9, 9, 0), (0, 0, 10, 20))
    image.save(tmp_path / "b.png")
    picture(tmp_path / "c.png")
    a, b, c = read_folder(tmp_path)
    assert [one.name for one in (a, b, c)] == ["a.png", "b.png", "c.png"]
    of_a, of_b = a.mask(), b.mask()
    assert of_a is not None
    assert of_b is not None
    assert (of_a.size, of_a.getpixel((2, 3)), of_a.getpixel((28, 3))) == ((30, 20), 255, 0)
    assert (of_b.size, of_b.getpixel((2, 3)), of_b.getpixel((28, 3))) == ((30, 20), 0, 255)
    assert c.mask() is None
    Image.new("L", (20, 30)).save(tmp_path / "a_mask.png")
    with pytest.raises(DiffgraftError, match=r"mask a_mask\.png is 20x30, but its picture is 30x20"):
        a.mask()


def test_the_size_of_a_turned_photograph_is_that_of_what_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    (found,) = read_folder(tmp_path)
    assert found.size == found.image.size == (20, 30)


def test_a_damaged_picture_is_seen_only_where_it_is_looked_at_thoroughly(tmp_path: Path) -> None:
    whole = picture(tmp_path / "a.jpg", size=(300, 200)).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    (tmp_path / "none.jpg").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"\.jpg is left out") as seen:
        assert [one.name for one in read_source(tmp_path)] == ["a.jpg"]
    assert len(seen) == 2
    with pytest.warns(UserWarning, match=r"none\.jpg is left out"):
        assert [one.name for one in read_source(tmp_path, thorough=False)] == ["a.jpg", "half.jpg"]


def test_rows_of_no_file_are_told_of(tmp_path: Path) -> None:
    Image.new("RGB", (40, 24)).save(tmp_path / "a.png")
    rows = [{"file_name": name, "text": name} for name in ("a.png", "b.png", "c.png")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.warns(UserWarning, match=r"names files that do not exist: b.png and 1 more"):
        assert [one.name for one in read_folder(tmp_path)] == ["a.png"]
