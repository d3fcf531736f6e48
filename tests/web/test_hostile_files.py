"""Paths that lead out of the library, uploads that are no pictures, and HTML in every text that a page shows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from starlette.testclient import TestClient

from diffgraft.web.paths import safe_name
from diffgraft.web.settings import Limits, Settings
from tests.web.conftest import client_of

HTML = "<img src=x onerror=alert(1)>'\"&</script>"


def a_run(settings: Settings, name: str = "dog") -> Path:
    run = settings.root / name
    (run / "samples").mkdir(parents=True)
    (run / "recipe.yaml").write_text("task: subject\nsteps: 20\n")
    return run


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "..%2Fsecret.png",
        "%2e%2e/%2e%2e/secret.png",
        "samples/../../../secret.png",
        "/etc/passwd",
        "a%00b.png",
    ],
)
def test_files_outside_of_a_run_are_not_sent(settings: Settings, path: str) -> None:
    a_run(settings)
    (settings.root / "secret.png").write_bytes(b"kept")
    (settings.root.parent / "secret.png").write_bytes(b"kept")
    with client_of(settings) as client:
        answer = client.get(f"/api/runs/dog/files/{path}")
        assert answer.status_code == 404
        assert b"kept" not in answer.content


def test_links_out_of_the_library_are_not_followed(settings: Settings, picture_file: Path) -> None:
    run = a_run(settings)
    (run / "samples" / "link.png").symlink_to(picture_file)
    (settings.root / "elsewhere").symlink_to(picture_file.parent)
    outside = picture_file.parent / "run"
    outside.mkdir()
    (outside / "recipe.yaml").write_text("task: subject\n")
    (settings.root / "linked").symlink_to(outside)
    with client_of(settings) as client:
        assert client.get("/api/runs/dog/files/samples/link.png").status_code == 404
        assert client.get("/api/pictures/list", params={"folder": "elsewhere"}).status_code == 404
        assert client.get("/api/pictures/thumbnail", params={"file": "elsewhere/dog.png"}).status_code == 404
        assert client.get("/api/runs/linked").status_code == 404
        assert [run["name"] for run in client.get("/api/runs").json()] == ["dog"]


@pytest.mark.parametrize("name", ["..", ".studio", "%2e%2e", "dog%2f..", "uploads", "x" * 5000])
def test_folders_that_are_no_runs_are_unknown(settings: Settings, name: str) -> None:
    a_run(settings)
    with client_of(settings) as client:
        assert client.get(f"/api/runs/{name}").status_code == 404
        assert client.get(f"/api/runs/{name}/events").status_code == 404


@pytest.mark.parametrize(
    "settings_given",
    [
        {"images": "/etc"},
        {"images": "../../etc"},
        {"base": "/etc/passwd"},
        {"prior.folder": "~/pictures"},
        {"sample_prompts": "a dog | /etc/passwd"},
        {"output": "elsewhere"},
        {"--resume": "x"},
        {"-x": "1"},
        {"prompt": "a\u0000b"},
        {"prompt": "x" * 30_000},
    ],
)
def test_trainings_use_no_files_from_elsewhere(client: TestClient, settings_given: dict[str, str]) -> None:
    for path in ("/api/runs", "/api/plan"):
        answer = client.post(path, json={"recipe": "subject", "settings": settings_given})
        assert answer.status_code in (400, 404), answer.text
    assert client.get("/api/queue").json() == []


def test_only_recipes_that_ship_are_trained(client: TestClient, settings: Settings) -> None:
    (settings.root / "mine.yaml").write_text("task: subject\n")
    for recipe in ("mine.yaml", "--help", "/etc/passwd"):
        assert client.post("/api/runs", json={"recipe": recipe}).status_code == 400


def test_uploads_are_decoded_named_and_counted(settings: Settings, picture_file: Path) -> None:
    content, limits = picture_file.read_bytes(), Limits(file=4000, files=5)
    with client_of(replace(settings, limits=limits)) as client:
        files = [
            ("files", ("../../../dog one.png", content)),
            ("files", ("page.html", b"<script>")),
            ("files", ("no.png", b"<script>alert(1)</script>")),
            ("files", ("large.png", content + b"\0" * 5000)),
            ("files", ("dog one.txt", "a dog, ein Hündchen".encode())),
        ]
        answer = client.post("/api/pictures", data={"folder": "../../up"}, files=files).json()
        assert len(answer["refusals"]) == 3
        folder = settings.uploads / "up"
        assert answer["folder"] == str(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["dog-one.png", "dog-one.txt"]
        (listed,) = client.get("/api/pictures/list", params={"folder": answer["folder"]}).json()
        assert listed["caption"] == "a dog, ein Hündchen"
        small = client.get("/api/pictures/thumbnail", params={"file": listed["file"]})
        assert small.headers["content-type"] == "image/webp"
        change = {"file": listed["file"], "caption": "a cat"}
        assert client.put("/api/pictures/caption", json=change).status_code == 200
        assert (folder / "dog-one.txt").read_text() == "a cat\n"
        change = {"file": str(picture_file), "caption": "x"}
        assert client.put("/api/pictures/caption", json=change).status_code == 404
        assert client.post("/api/pictures", data={"folder": "up"}, files=files * 2).status_code == 400
        assert client.post("/api/pictures", data={"folder": "up"}).status_code == 400
    with client_of(replace(settings, limits=Limits(upload=1000))) as client:
        assert client.post("/api/pictures", data={"folder": "up"}, files=files).status_code == 413


def test_names_are_safe() -> None:
    for text in ("", "..", "../..", ".studio", "uploads", "a/b\\c", "\0", "-rf", "x" * 500, "CON\n"):
        name = safe_name(text, "fallback")
        assert name
        assert not set(name) & set("/\\\0\n")
        assert not name.startswith((".", "-"))
        assert len(name) <= 80
    assert safe_name("小狗 Größe", "x") == "小狗-Größe"


def test_texts_of_files_are_shown_as_text(settings: Settings) -> None:
    run = a_run(settings, "a&b 'run'")
    (run / "recipe.yaml").write_text(json.dumps(dict.fromkeys(("task", "method", "base", "trigger", "steps"), HTML)))
    (run / "studio").mkdir()
    (run / "studio" / "events.jsonl").write_text(f"error: {HTML}\n")
    (run / "samples" / f"{HTML.replace('/', '')}.png").write_bytes(b"")
    (run / "checkpoints" / HTML.replace("/", "")).mkdir(parents=True)
    (settings.root / ".studio" / "queue").mkdir(parents=True)
    base = {"name": HTML, "family": HTML}
    written = {"method": HTML, "trigger": HTML, "class": HTML, "base": base, "recipe": {"task": HTML}}
    header = {"diffgraft": json.dumps(written)}
    leaf = torch.ones(2, 3)
    tensors = {f"lora_unet_down_blocks_0.lora_{way}.weight": leaf for way in ("down", "up")}
    save_file({name: value.clone() for name, value in tensors.items()}, settings.root / "bad.safetensors", header)
    name = "/runs/a&b 'run'".replace("&", "%26")
    with client_of(settings) as client:
        for path in (
            "/",
            name,
            f"/train?folder={HTML}",
            f"/train?recipe={HTML}",
            f"/runs/{HTML.replace('/', '')}",
            f"/login?to=/{HTML}",
        ):
            text = client.get(path).text
            assert "<img src=x" not in text, path
            assert "&lt;img" in text, path


def test_damaged_files_are_shown_as_far_as_they_go(settings: Settings) -> None:
    for number, text in enumerate(["", "[1]", "{", "a: *b", "\0", "&a [*a]", "steps: [1, 2]", "[" * 3000]):
        run = a_run(settings, f"run-{number}")
        (run / "recipe.yaml").write_text(text)
        (run / "metrics.jsonl").write_text(
            '{"step": 1, "loss": NaN}\nnonsense\n{"step": "x"}\n{"step": 7, "loss": 0.5}\n['
        )
        (run / "studio").mkdir()
        (run / "studio" / "events.jsonl").write_bytes(b"\xff\xfe\n[1]\n" + b"x" * 300_000)
        (run / "studio" / "process.json").write_text('{"pid": -1, "created": "x"}')
    (settings.root / "bad.safetensors").write_bytes(b"\xff" * 100)
    with client_of(settings) as client:
        assert client.get("/").status_code == 200
        for run in client.get("/api/runs").json():
            detail = client.get(f"/api/runs/{run['name']}").json()
            assert [entry["step"] for entry in detail["metrics"]] == [1, 7]
            assert run["step"] == 7
            assert client.get(f"/api/runs/{run['name']}/events").text.endswith("event: end\ndata: {}\n\n")
        assert client.get("/api/adapters/bad.safetensors").status_code == 400
