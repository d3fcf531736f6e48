"""Files appear whole or not at all, and never over another."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffgraft.files import replacing, unused, write_safetensors, write_text


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old")

    def break_off(partial: Path) -> None:
        partial.write_text("half", "utf-8")
        raise RuntimeError

    with pytest.raises(RuntimeError), replacing(path) as partial:
        break_off(partial)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text("utf-8") == "old"
    write_text(path, "new")
    assert path.read_text("utf-8") == "new"


def test_equal_tensors_are_equal_bytes(tmp_path: Path) -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.ones(1)
    header = dict.fromkeys("zyxwvu", "x")
    first = write_safetensors(tmp_path / "1", {"a": a, "b": b}, header)
    second = write_safetensors(tmp_path / "2", {"b": b, "a": a}, dict(reversed(header.items())))
    assert first.read_bytes() == second.read_bytes()
    assert torch.equal(load_file(first)["a"], a)


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert unused(path) == path
    for name in ("a.png", "a-2.png"):
        (tmp_path / name).touch()
    assert unused(path) == tmp_path / "a-3.png"
