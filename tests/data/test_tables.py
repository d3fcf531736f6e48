"""Tables of captions name pictures in any spelling of their paths, and nothing outside their folder."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from diffgraft.data.image_folder import read_folder
from diffgraft.errors import DiffgraftError
from tests.data.test_image_folder import picture


def table(folder: Path, *rows: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


@pytest.mark.parametrize(
    "spelling", ["./deep/a.png", "deep//a.png", "deep/../deep/a.png", "deep\\a.png", "{}/deep/a.png"]
)
def test_a_picture_is_one_however_its_path_is_written(tmp_path: Path, spelling: str) -> None:
    picture(tmp_path / "deep" / "a.png")
    picture(tmp_path / "b.png")
    table(
        tmp_path, {"file_name": spelling.format(tmp_path), "text": "a dog"}, {"file_name": "./b.png", "text": "a cat"}
    )
    assert [(one.name, one.captions) for one in read_folder(tmp_path)] == [
        ("b.png", ("a cat",)),
        ("deep/a.png", ("a dog",)),
    ]


@pytest.mark.parametrize("given", ["own", "./own/", "linked"])
def test_absolute_paths_are_those_of_a_folder_however_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    own = tmp_path / "own"
    for name in ("a.png", "deep/b.png"):
        picture(own / name)
    (tmp_path / "linked").symlink_to(own)
    table(own, *({"file_name": str(own / name), "text": name} for name in ("a.png", "deep/b.png")))
    monkeypatch.chdir(tmp_path)
    assert [(one.name, one.captions) for one in read_folder(given)] == [
        ("a.png", ("a.png",)),
        ("deep/b.png", ("deep/b.png",)),
    ]


def test_names_are_one_in_both_of_unicodes_forms(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    picture(tmp_path / composed)
    table(tmp_path, {"file_name": decomposed, "text": "a dog"})
    assert [one.captions for one in read_folder(tmp_path)] == [("a dog",)]


def test_rows_of_one_picture_are_its_captions(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    rows = [{"file_name": name, "text": said} for name, said in (("a.png", "one"), ("./a.png", ["two", "one"]))]
    assert [one.captions for one in read_folder(table(tmp_path, *rows))] == [("one", "two")]


@pytest.mark.parametrize("name", ["../secret/x.png", "{}/secret/x.png", "link/x.png"])
def test_pictures_outside_are_read_only_where_that_is_meant(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "secret" / "x.png")
    own = tmp_path / "own"
    picture(own / "a.png")
    (own / "link").symlink_to(tmp_path / "secret")
    table(own, {"file_name": name.format(tmp_path), "text": "a secret"})
    with pytest.raises(DiffgraftError, match=r"metadata\.jsonl, line 1 is a file outside of .*x\.png.*outside=true"):
        read_folder(own)
    assert sorted(one.captions for one in read_folder(own, outside=True)) == [(), ("a secret",)]


@pytest.mark.parametrize(
    ("rows", "answer"),
    [
        ("", "has no rows"),
        ('{"file_name": null}\n', "line 1 names no file: file_name is None"),
        ('{"file_name": 3}\n', "line 1 names no file: file_name is 3"),
        ('{"file_name": "a.png", "text": "x"}\n\n["a"]\n', "line 3 is a list, not a JSON object"),
        ('{"file_name": "a.png", "text": {"x": 1}}\n', "line 1, column text holds dict"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png",}\n', "line 2, column 23"),
        ('{"file_name": "a.png", "text": "x", "text": "y"}\n', "line 1: 'text' is there twice"),
        ('{"file_name": "a.png", "text": true}\n', "line 1, column text holds bool"),
        ("[" * 100_000, "cannot be read as a table"),
        ('{"file_name": "a\\u0000.png"}\n', "names no file"),
        (json.dumps({"file_name": "x" * 5000, "text": ""}), "cannot be opened"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, rows: str, answer: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(rows, "utf-8")
    with pytest.raises(DiffgraftError, match=answer) as told:
        read_folder(tmp_path)
    assert len(str(told.value)) < 500


def test_a_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,café\n".encode("latin-1"))
    with pytest.raises(DiffgraftError, match=r"metadata\.csv is not written in UTF-8 .*Save it as UTF-8"):
        read_folder(tmp_path)


def test_rows_without_words_and_tables_without_captions_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"has no captions for a\.png"):
        read_folder(table(tmp_path, {"file_name": "a.png", "text": " "}))
    with pytest.warns(UserWarning, match="no column of captions .*columns are: file_name, said"):
        read_folder(table(tmp_path, {"file_name": "a.png", "said": "a dog"}))


@pytest.mark.parametrize(
    ("rows", "answer"),
    [
        ("a.png,a dog\n", "no rows, only the line .*: the first line names the columns"),
        ("file_name,text\n", "no rows, only the line"),
        ("file_name,text,text\na.png,a,b\n", "the column 'text' is there twice"),
        ("file_name,text\na.png,a,b\n", "line 2 has more cells"),
    ],
)
def test_a_csv_that_cannot_be_meant_is_refused(tmp_path: Path, rows: str, answer: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(rows, "utf-8")
    with pytest.raises(DiffgraftError, match=answer):
        read_folder(tmp_path)


def test_blanks_around_names_of_columns_and_empty_cells_do_not_matter(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(" file_name , text\na.png,a dog\n", "utf-8")
    assert [one.captions for one in read_folder(tmp_path)] == [("a dog",)]
    (tmp_path / "metadata.csv").unlink()
    table(tmp_path, {"file_name": "a.png", "text": [float("nan"), "a cat"]})
    assert [one.captions for one in read_folder(tmp_path)] == [("a cat",)]


@pytest.mark.parametrize("name", ["a_mask.png", "deep/b-masklabel.png", "notes.md"])
def test_a_row_that_names_no_picture_to_learn_from_is_told(tmp_path: Path, name: str) -> None:
    for each in ("a.png", "deep/b.png", name):
        picture(tmp_path / each) if each.endswith("png") else (tmp_path / each).write_text("x", "utf-8")
    table(tmp_path, *({"file_name": each, "text": "a dog"} for each in ("a.png", "deep/b.png", name)))
    with pytest.warns(UserWarning, match=f"files that are no pictures, or masks; they are left out: {name}"):
        assert [one.name for one in read_folder(tmp_path)] == ["a.png", "deep/b.png"]


def test_of_two_sources_of_captions_the_one_that_is_used_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    table(tmp_path, {"file_name": "a.png", "text": "of the table", "prompt": "of another column"})
    with pytest.warns(UserWarning, match="2 columns of captions, text, prompt: text is used"):
        assert [one.captions for one in read_folder(tmp_path)] == [("of the table",)]
    table(tmp_path, {"file_name": "a.png", "text": "of the table"})
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,of the csv\n", "utf-8")
    with pytest.warns(UserWarning, match=r"two tables of captions: metadata\.jsonl is read, metadata\.csv is not"):
        assert [one.captions for one in read_folder(tmp_path)] == [("of the table",)]
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "a.txt").write_text("of the file", "utf-8")
    with pytest.warns(
        UserWarning, match=r"a\.png has a caption in a file and another in the table: the file's is used"
    ):
        assert [one.captions for one in read_folder(tmp_path)] == [("of the file",)]
