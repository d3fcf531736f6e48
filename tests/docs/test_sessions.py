"""The example of the page on sessions runs, and the page lists every sampler and schedule."""

import re
from pathlib import Path

import pytest

from diffgraft.generation.samplers.names import SAMPLERS
from diffgraft.generation.samplers.schedules import SCHEDULES
from diffgraft.trainers.run.folder import Run

TEXT = (Path(__file__).parents[2] / "docs/sessions.md").read_text("utf-8")


def test_the_example_runs(short_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    folder = tmp_path / "runs" / "poodle"
    folder.mkdir(parents=True)
    (folder / "adapter.safetensors").write_bytes(short_run.adapter_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(block.replace("steps=20", "steps=4"), found)
    pictures = found["pictures"]
    assert isinstance(pictures, list)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2


def test_samplers_and_schedules_are_listed() -> None:
    words = " ".join(TEXT.lower().split())
    assert all(f"{name}" in words for name in (*SAMPLERS, *SCHEDULES))
