"""The examples of the pages on drawing run, and the page on samplers lists every sampler and schedule."""

import re
from pathlib import Path

import pytest

from diffgraft.generation.samplers.names import SAMPLERS
from diffgraft.generation.samplers.schedules import SCHEDULES
from diffgraft.trainers.run.folder import Run

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["sessions", "prompts", "samplers", "regions", "editing"])
def test_the_examples_run(page: str, short_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / f"{page}.md").read_text("utf-8")
    folder = tmp_path / "runs" / "alien"
    folder.mkdir(parents=True)
    (folder / "adapter.safetensors").write_bytes(short_run.adapter_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(re.sub(r"steps=\d+", "steps=3", block), found)
    pictures = found["pictures"]
    assert isinstance(pictures, list)
    assert all(picture.size in ((64, 64), (128, 64)) for picture in pictures)


def test_samplers_and_schedules_are_listed() -> None:
    words = " ".join((DOCS / "samplers.md").read_text("utf-8").lower().split())
    assert all(f"{name}" in words for name in (*SAMPLERS, *SCHEDULES))
