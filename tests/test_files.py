"""Files appear whole or not at all, and never over another."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffgraft.errors import DiffgraftError
from diffgraft.files import atomic_folder, atomic_write, exclusive_lock, unique_path, write_safetensors, write_text


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old")

    def break_off(partial: Path) -> None:
        partial.write_text("half", "utf-8")
        raise RuntimeError

    with pytest.raises(RuntimeError), atomic_write(path) as partial:
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
    assert unique_path(path) == path
    for name in ("a.png", "a-2.png"):
        (tmp_path / name).touch()
    assert unique_path(path) == tmp_path / "a-3.png"


def test_a_folder_is_one_process_s_alone(tmp_path: Path) -> None:
    """A second process is refused while the first is there, and let in once that was killed."""
    folder = tmp_path / "new" / "run"
    script = (
        "import sys, time, pathlib; from diffgraft.files import exclusive_lock\n"
        "with exclusive_lock(pathlib.Path(sys.argv[1])): print('there', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "there\n"
        with pytest.raises(DiffgraftError, match="Another process is using"), exclusive_lock(folder):
            pass
        first.kill()
    with exclusive_lock(folder):
        (folder / "a").touch()
    with exclusive_lock(folder):
        assert (folder / "a").exists()


def test_a_folder_takes_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "step").write_text("something else", "utf-8")
    with atomic_folder(tmp_path / "step") as partial:
        (partial / "a").write_text("x", "utf-8")
    assert (tmp_path / "step" / "a").read_text("utf-8") == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
