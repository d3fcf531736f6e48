"""A disk that is full is told of, and nothing on it is lost or half there: on a real one, of very little room."""

import ctypes
import errno
import os
import re
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from diffgraft.disk import DiskFullError, format_bytes, full_disk_errors
from diffgraft.trainers.hooks.checkpoint import checkpoints
from diffgraft.trainers.hooks.metrics import Metrics, read_metrics
from diffgraft.trainers.run.train import train
from tests.recipes import SUBJECT
from tests.trainers.kill_helpers import SERVER, check_whole
from tests.trainers.test_resumed import differing

SETTINGS: dict[str, Any] = {"subject": "dog", "steps": 4, "checkpoint_every": 2, "sample_every": 3, "batch": 2}
SETTINGS |= {"sample_prompts": "a dog", "prior": {"weight": 0}, "cache": False}
ROOM = (4, *range(300, 9000, 700))
"""kB of the disk, little by little"""
_REMOUNT, _PRIVATE, _NEW_MOUNTS, _NEW_USER = 32, 0x44000, 0x20000, 0x10000000


def mount(folder: Path, room: int, flags: int = 0) -> bool:
    """A disk in memory with so many kB, in the place of a folder; whether that is allowed."""
    return ctypes.CDLL(None).mount(b"tmpfs", bytes(folder), b"tmpfs", flags, f"size={room}k".encode()) == 0


def may_have_disks() -> bool:
    """Make this process one whose disks nobody else sees; whether it may have any."""
    system, ids = ctypes.CDLL(None), (os.getuid(), os.getgid())
    if ids[0] == 0:
        return system.unshare(_NEW_MOUNTS) == 0 and system.mount(None, b"/", None, _PRIVATE, None) == 0
    if system.unshare(_NEW_USER | _NEW_MOUNTS) != 0:
        return False
    Path("/proc/self/setgroups").write_text("deny", "utf-8")
    for name, own in zip(("uid_map", "gid_map"), ids, strict=True):
        Path(f"/proc/self/{name}").write_text(f"0 {own} 1", "utf-8")
    return True


def run_on_little_room(pipe: Connection, pictures: Path, place: Path) -> None:
    """In a process of its own: a run on a disk that grows, and what it says each time."""
    from tests.drawing import draw_in
    from tests.trainers.preloaded_base import BASE

    if not may_have_disks():  # only a process without threads may, as it is before it has trained
        return
    disk = place / "disk"
    draw_in(2)
    whole = train(SUBJECT, base=BASE, images=pictures, output=place / "whole", **SETTINGS).folder
    disk.mkdir()
    if not mount(disk, ROOM[0]):
        return
    folder, newest = disk / "run", ""
    for room in ROOM:
        assert mount(disk, room, _REMOUNT)
        started = (folder / "recipe.yaml").exists()
        settings = {"resume": folder} if started else {"images": pictures, "output": folder, **SETTINGS}
        try:
            train(SUBJECT, base=BASE, **settings)
        except DiskFullError as full:
            pipe.send(str(full).replace(str(disk), "DISK"))
        else:
            assert differing(folder, whole) == set()
            pipe.send("")
            return
        check_whole(folder)
        assert all(path.name == ".lock" for path in folder.rglob(".*"))
        last = max((path.name for path in checkpoints(folder)), default="")
        assert last >= newest
        newest = last


def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(pictures: Path, tmp_path: Path) -> None:
    ours, theirs = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=run_on_little_room, args=(theirs, pictures, tmp_path))
    process.start()
    theirs.close()
    said: list[str] = []
    while True:
        try:
            said.append(ours.recv())
        except EOFError:
            break
    process.join()
    assert process.exitcode == 0
    if not said:
        pytest.skip("this process may have no disks of its own")
    assert said.pop() == ""
    told = (
        r"The disk is full: DISK/run/(\S+) (needs about [0-9.]+ (?:kB|MB)|could not be written), and "
        r"[0-9.]+ (?:bytes|kB|MB) are free\. Free up space\. Then continue with: diffgraft train --resume DISK/run"
    )
    found = [match.groups() for one in said if (match := re.fullmatch(told, one))]
    assert len(found) == len(said)
    assert found[0] == ("metrics.jsonl", "could not be written")
    assert {("checkpoints/step-000002", "needs about 1.3 MB"), ("checkpoints/step-000004", "needs about 1.3 MB")} <= {
        *found
    }


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    """The file may grow by a few bytes still, and no further."""
    record = Metrics(tmp_path, 9, 0, writes=True)
    record.add({"step": 1, "loss": 0.5})
    file = tmp_path / "metrics.jsonl"
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 7, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=r"metrics.jsonl could not be written"):
            record.add({"step": 2, "loss": 0.4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    record.add({"step": 2, "loss": 0.4})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]


def test_which_errors_are_those_of_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"

    def write(error: Exception, size: int = 0) -> None:
        with full_disk_errors(path, size):
            raise error

    told = ("Error while serializing: I/O error: No space left on device (os error 28)", "x (os error 122)")
    for error in (OSError(errno.ENOSPC, ""), OSError(errno.EDQUOT, ""), *map(SafetensorError, told)):
        with pytest.raises(DiskFullError, match=r"new/file needs about 2.5 GB, and .* are free"):
            write(error, 2_500_000_000)
    for other in (OSError(errno.EACCES, ""), SafetensorError("x (os error 13)"), SafetensorError("x")):
        with pytest.raises(type(other)) as caught:
            write(other)
        assert caught.value is other
    with pytest.raises(DiskFullError, match="inner"):
        write(DiskFullError("inner"))
    assert [format_bytes(size) for size in (999, 1000, 1_250_000, 3e9)] == ["999 bytes", "1.0 kB", "1.2 MB", "3.0 GB"]
