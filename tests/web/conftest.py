"""A studio of a temporary folder, whose trainings are a small program that writes what a training writes."""

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from diffgraft.web.app import create_app
from diffgraft.web.settings import Settings

FAKE = textwrap.dedent('''
    """Trains as `diffgraft train` does, as far as the studio sees: 20 steps, or until Ctrl-C."""
    import json, pathlib, sys, time

    def emit(**event):
        print(json.dumps(event), file=sys.stderr, flush=True)

    words = sys.argv[1:]
    if words[0] == "plan":
        print("recipe    subject by lora on tiny")
        if not any(word.startswith("images=") for word in words):
            sys.exit("error: The recipe subject has no images: add images=FOLDER.")
        sys.exit(0)
    if words[0] in ("convert", "resize", "combine", "merge"):
        print(json.dumps(words))
        sys.exit("error: The size of the adapter is missing." if words[0] == "resize" and "--rank" not in words else 0)
    if words[0] == "evaluate":
        emit(event="done", name="drawing", seconds=1.0)
        sys.exit(0)
    given = dict(word.partition("=")[::2] for word in words if "=" in word)
    run = pathlib.Path(words[words.index("--resume") + 1] if "--resume" in words else given["output"])
    if given.get("images") == "":
        sys.exit("error: The recipe subject has no images.")
    steps, wait = int(given.get("steps", 20)), float(given.get("lr", 0.01))
    (run / "recipe.yaml").write_text(f"# diffgraft train recipe.yaml\\ntask: subject\\nsteps: {steps}\\n")
    metrics = run / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    try:
        with metrics.open("a") as file:
            for step in range(done + 1, steps + 1):
                time.sleep(wait)
                print(json.dumps({"step": step, "loss": 1 / step}), file=file, flush=True)
                emit(event="step", step=step, total=steps, values={"loss": 1 / step})
    except KeyboardInterrupt:
        (run / "checkpoints").mkdir(exist_ok=True)
        (run / "checkpoints" / "step").mkdir(exist_ok=True)
        sys.exit(f"error: Interrupted. Continue with: diffgraft train --resume {run}")
    (run / "adapter.safetensors").write_bytes(b"")
    emit(event="done", name="training", seconds=1.0)
''')


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    program = tmp_path / "fake.py"
    program.write_text(FAKE, "utf-8")
    return Settings(tmp_path / "library", command=(sys.executable, str(program)))


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with client_of(settings) as client:
        yield client


def client_of(settings: Settings, **options: Any) -> TestClient:
    return TestClient(create_app(settings), base_url="http://localhost:7870", **options)


@pytest.fixture
def picture_file(tmp_path: Path) -> Path:
    path = tmp_path / "dog.png"
    Image.new("RGB", (40, 24), "teal").save(path)
    return path


@pytest.fixture
def wait_for() -> Callable[[Callable[[], Any]], Any]:
    """Wait until a condition holds, at most a minute, as machines may be busy."""
    import time

    def wait(condition: Callable[[], Any]) -> Any:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.05)
        pytest.fail("waited in vain")

    return wait
