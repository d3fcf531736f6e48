"""Drawings: asked for, drawn by a program of its own, found again, compared and kept as pairs."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError
from starlette.testclient import TestClient

from diffgraft.data.image_folder import read_folder
from diffgraft.generation.metadata import read_record
from diffgraft.generation.samplers.names import SAMPLERS as KNOWN
from diffgraft.trainers.objectives.preference import OBJECTIVE
from diffgraft.trainers.recipe.groups import DataSettings
from diffgraft.trainers.training_data.pairs import with_partners
from diffgraft.web.drawings import SAMPLERS, Drawings, MixedAdapter, Result, write_result
from diffgraft.web.painter import Painter
from diffgraft.web.painting import PainterWatch
from diffgraft.web.processes import running_process
from diffgraft.web.settings import Limits, Settings
from tests.web.conftest import client_of

Wait = Callable[[Callable[[], Any]], Any]
DRAW = {"prompt": "a dog", "steps": 2}


@pytest.fixture
def waiting(settings: Settings) -> TestClient:
    """A client of a studio that is not entered, so that nothing is drawn but by hand."""
    return client_of(settings)


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Painter]:
    """A painter of a library, in this process, which holds the base for all tests."""
    root = tmp_path_factory.mktemp("library")
    settings = Settings(root)
    client_of(settings)
    return settings, Painter(root)


def drawn(painter: tuple[Settings, Painter], **request: Any) -> dict[str, Any]:
    """Draw a request, and return the drawing."""
    settings, program = painter
    client = client_of(settings)
    answer = client.post("/api/drawings", json={**DRAW, **request})
    assert answer.status_code == 202, answer.text
    job = program._claim()
    assert job is not None
    program._do(job)
    found: dict[str, Any] = client.get(f"/api/drawings/{answer.json()['id']}").json()
    return found


def test_the_samplers_of_the_form_are_those_that_draw() -> None:
    assert [name.lower() for name in SAMPLERS] == list(KNOWN)


def test_pictures_are_drawn_with_their_seeds_and_tell_how(painter: tuple[Settings, Painter]) -> None:
    found = drawn(painter, count=2, seed=5, width=64, height=48, negative="night")
    assert (found["state"], found["pictures"]) == ("finished", ["1.png", "2.png"])
    for place, name in enumerate(found["pictures"]):
        path = painter[0].root / "drawings" / found["id"] / name
        record, told = read_record(path)
        assert record is not None
        assert (record.seed, record.size, record.prompt) == (5 + place, (64, 48), "a dog")
        assert "Negative prompt: night" in told
    client = client_of(painter[0])
    text = client.get(f"/api/drawings/{found['id']}/events").text
    assert '"event": "advance"' in text
    assert '"path": "2.png"' in text
    assert text.endswith("event: end\ndata: {}\n\n")
    assert f"Seed: {found['request']['seed'] + 1}" in client.get(f"/drawings/{found['id']}").text
    again = drawn(painter, **found["request"])
    pixels = [Image.open(painter[0].root / "drawings" / each["id"] / "2.png").tobytes() for each in (found, again)]
    assert pixels[0] == pixels[1]


def test_a_plot_is_one_sheet(painter: tuple[Settings, Painter]) -> None:
    axes = [{"name": "seed", "values": "1, 2, 3"}, {"name": "steps", "values": "1-2"}]
    found = drawn(painter, axes=axes, width=64, height=48)
    assert found["pictures"] == ["sheet.png"]
    with Image.open(painter[0].root / "drawings" / found["id"] / "sheet.png") as sheet:
        assert sheet.width > 3 * 128 > sheet.height
    many = drawn(painter, axes=[{"name": "seed", "values": "1-300"}])
    assert many["state"] == "failed"
    assert "300 pictures: at most 200" in many["message"]


def test_what_is_wrong_in_a_prompt_is_told_with_its_place(painter: tuple[Settings, Painter]) -> None:
    regions = [{"prompt": "a cat <lora:none:1>", "box": [0, 0, 0.5, 1]}]
    found = drawn(painter, prompt="a dog <lora:cat:x> {1234567$$a}", regions=regions)
    assert found["state"] == "failed"
    where = [(each["field"], each["start"], each["end"]) for each in found["problems"]]
    assert where == [("prompt", 6, 18), ("prompt", 19, 31), ("regions.0", 6, 19)]
    assert found["message"] == found["problems"][0]["text"]
    page = client_of(painter[0]).get(f"/drawings/{found['id']}").text
    assert "<mark>&lt;lora:cat:x&gt;</mark>" in page


def test_a_remark_does_not_hinder_drawing(painter: tuple[Settings, Painter]) -> None:
    found = drawn(painter, prompt="a (red dog")
    assert found["state"] == "finished"
    assert [each["is_error"] for each in found["problems"]] == [False]
    (remark,) = client_of(painter[0]).post("/api/prompt", json={"prompt": "a (red dog", "steps": 9}).json()
    assert (remark["start"], remark["end"], remark["is_error"]) == (2, 10, False)


@pytest.mark.parametrize("change", [{"sampler": "None"}, {"width": 63, "height": 48}, {"base": "tinny"}])
def test_a_drawing_that_fails_says_why_and_the_next_is_drawn(
    painter: tuple[Settings, Painter], change: dict[str, Any]
) -> None:
    failed = drawn(painter, **change)
    assert failed["state"] == "failed"
    assert next(iter(change.values())) in (63, "None", "tinny")
    assert len(failed["message"]) > 20
    assert drawn(painter)["state"] == "finished"


def test_a_cancelled_drawing_stops(painter: tuple[Settings, Painter]) -> None:
    settings, program = painter
    client = client_of(settings)
    name = client.post("/api/drawings", json={**DRAW, "steps": 50}).json()["id"]
    job = program._claim()
    assert job is not None
    assert client.get(f"/api/drawings/{name}").json()["state"] in ("queued", "running")
    assert client.delete(f"/api/drawings/{name}").status_code == 200
    program._do(job)
    assert client.get(f"/api/drawings/{name}").json()["state"] == "stopped"
    assert client.delete(f"/api/drawings/{name}").status_code == 200
    assert client.get(f"/api/drawings/{name}").status_code == 404


def test_strengths_by_block_and_step_become_a_tag() -> None:
    plain = MixedAdapter(file="dog.safetensors", strength=0.8, text_encoder=0.5)
    assert plain.tag == ""
    finer = MixedAdapter(file="dog.safetensors", strength=0.8, blocks={"mid": 0.5}, start=0.25)
    assert finer.tag == "<lora:dog.safetensors:0.8:0.8:mid=0.5:start=0.250>"
    for strange in ("a>b", "a:b", ""):
        with pytest.raises(ValidationError):
            MixedAdapter(file=strange)


def test_what_waits_is_listed_removed_and_bounded(settings: Settings, waiting: TestClient) -> None:
    names = [waiting.post("/api/drawings", json=DRAW).json()["id"] for _ in range(3)]
    assert [each["id"] for each in waiting.get("/api/drawings").json()] == names[::-1]
    assert [each["id"] for each in waiting.get(f"/api/drawings?before={names[2]}&count=1").json()] == [names[1]]
    assert waiting.delete(f"/api/drawings/{names[0]}").status_code == 200
    assert waiting.get(f"/api/drawings/{names[0]}").status_code == 404
    assert len(list((settings.state_folder / "drawings" / "queue").iterdir())) == 2
    seeds = {waiting.post("/api/drawings", json={**DRAW, "seed": -1}).json()["request"]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert min(seeds) >= 0
    few = client_of(replace(settings, limits=Limits(queue=5)))
    assert few.post("/api/drawings", json=DRAW).status_code == 429
    slow = client_of(replace(settings, limits=Limits(drawings_per_minute=1)))
    assert [slow.post("/api/drawings", json=DRAW).status_code for _ in range(2)] == [202, 429]


@pytest.mark.parametrize(
    "change",
    [
        {"adapters": [{"file": "../dog.safetensors"}]},
        {"adapters": [{"file": "/etc/passwd"}]},
        {"adapters": [{"file": "dog.safetensors", "strength": 1e9}]},
        {"adapters": [{"file": "dog.safetensors", "path": "x"}]},
        {"base": "/etc"},
        {"base": "../elsewhere"},
        {"axes": [{"name": " adapter ", "values": "/etc/*"}]},
        {"axes": [{"name": "adapter", "values": "dog.safetensors, ../x.safetensors"}]},
        {"axes": [{"name": "", "values": "1"}]},
        {"count": 10**6},
        {"steps": 10**9},
        {"width": 10**6, "height": 8},
        {"prompt": "x" * 20_000},
        {"seed": -2},
        {"guidance": "nan"},
        {"unknown": 1},
    ],
)
def test_requests_that_ask_for_other_files_or_too_much_are_refused(
    settings: Settings, waiting: TestClient, change: dict[str, Any]
) -> None:
    (settings.root / "dog.safetensors").write_bytes(b"")
    answer = waiting.post("/api/drawings", json={**DRAW, **change})
    assert answer.status_code in (400, 404, 422), answer.text
    assert waiting.get("/api/drawings").json() == []


@pytest.mark.parametrize("name", ["...", ".studio", "x" * 5000, "a%2fb", "%00"])
def test_drawings_and_pictures_that_are_none_are_unknown(waiting: TestClient, name: str) -> None:
    found = waiting.post("/api/drawings", json=DRAW).json()["id"]
    assert waiting.get(f"/api/drawings/{name}").status_code == 404
    assert waiting.delete(f"/api/drawings/{name}").status_code in (404, 405)
    assert waiting.get(f"/api/drawings/{found}/files/{name}").status_code == 404
    assert waiting.get(f"/api/drawings/{found}/files/request.json").status_code == 404
    assert waiting.get("/compare", params={"first": f"{name}/1.png", "second": "x"}).status_code == 404


def test_damaged_files_of_drawings_are_no_trouble(settings: Settings, waiting: TestClient) -> None:
    names = [waiting.post("/api/drawings", json=DRAW).json()["id"] for _ in range(4)]
    folder = settings.root / "drawings"
    (folder / names[0] / "request.json").write_text("{")
    (folder / names[1] / "studio" / "result.json").write_text('{"state": "<script>", "problems": 3}')
    problem = {"text": "<b>", "start": -5, "end": 10**9, "is_error": True, "field": "regions.7"}
    known = {**problem, "field": "prompt"}
    (folder / names[2] / "studio" / "result.json").write_text(
        json.dumps({"state": "failed", "message": "<script>alert(1)</script>", "problems": [problem, known]})
    )
    (folder / names[3] / "1.png").write_bytes(b"no picture")
    states = {each["id"]: each["state"] for each in waiting.get("/api/drawings").json()}
    assert states == {names[1]: "failed", names[2]: "failed", names[3]: "queued"}
    page = waiting.get("/draw").text
    assert "<script>" not in page.replace('<script src="/static', "")
    assert "<b>" not in page
    assert waiting.get(f"/drawings/{names[3]}").status_code == 200


def test_the_better_of_two_is_kept_as_the_recipe_reads_it(painter: tuple[Settings, Painter]) -> None:
    client = client_of(painter[0])
    found = drawn(painter, count=2, width=64, height=48)
    first, second = (f"{found['id']}/{name}" for name in found["pictures"])
    assert "Seed" not in client.get("/compare", params={"first": first, "second": second}).text
    kept = client.post("/api/preferences", json={"better": second, "worse": first}).json()
    assert kept["pairs"] == 1
    (picture,) = with_partners_of(Path(kept["folder"]))
    assert picture.partner is not None
    for own, name in ((picture, second), (picture.partner, first)):
        assert own.image.tobytes() == Image.open(painter[0].root / "drawings" / name).tobytes()
    assert picture.captions == ("a dog",)
    assert client.post("/api/preferences", json={"better": first, "worse": second}).json()["pairs"] == 1
    other = drawn(painter, width=48, height=64)
    for worse in (f"{other['id']}/1.png", second, f"{found['id']}/9.png"):
        answer = client.post("/api/preferences", json={"better": second, "worse": worse})
        assert answer.status_code in (400, 404)


def with_partners_of(folder: Path) -> Any:
    assert OBJECTIVE.pairs is not None
    concept = DataSettings(images=str(folder))
    with pytest.warns(UserWarning, match="rejected"):
        pictures = read_folder(folder)
    return with_partners(concept, pictures, OBJECTIVE.pairs)


SLOW = """
import sys, time
from pathlib import Path
from diffgraft.web import painter
from diffgraft.web.drawings import Result

class Slow(painter.Painter):
    def __init__(self, root):
        self._root, self._queue = root, painter.Queue(root / ".studio" / "drawings")

    def _draw(self, request, folder):
        time.sleep(0 if request.steps == 2 else 60)
        return Result("finished")

painter.Painter = Slow
painter.main(Path(sys.argv[1]))
"""


def test_a_killed_painter_loses_the_drawing_at_hand_alone(settings: Settings, wait_for: Wait) -> None:
    with client_of(replace(settings, painter=(sys.executable, "-c", SLOW))) as client:
        lost = client.post("/api/drawings", json={**DRAW, "steps": 1000}).json()["id"]
        kept = client.post("/api/drawings", json=DRAW).json()["id"]
        wait_for(lambda: client.get(f"/api/drawings/{lost}").json()["state"] == "running")
        pid = running_process(settings.state_folder / "painter")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: client.get(f"/api/drawings/{lost}").json()["state"] == "failed")
        assert "ended unexpectedly" in client.get(f"/api/drawings/{lost}").json()["message"]
        wait_for(lambda: client.get(f"/api/drawings/{kept}").json()["state"] == "finished")
    assert running_process(settings.state_folder / "painter") is None  # it ends with a studio that has nothing to draw


def test_a_program_that_cannot_begin_is_not_started_for_ever(settings: Settings, wait_for: Wait) -> None:
    with client_of(replace(settings, painter=("/bin/false",))) as client:
        names = [client.post("/api/drawings", json=DRAW).json()["id"] for _ in range(2)]
        wait_for(lambda: {client.get(f"/api/drawings/{name}").json()["state"] for name in names} == {"failed"})
        assert "status 1" in client.get(f"/api/drawings/{names[0]}").json()["message"]


def test_a_result_is_not_lost_if_the_program_ends_right_after_it(settings: Settings, waiting: TestClient) -> None:
    drawings = Drawings(settings)
    name = waiting.post("/api/drawings", json=DRAW).json()["id"]
    (job,) = drawings.queue.jobs()
    drawings.queue.file(job).rename(drawings.queue.started / f"{job.id}.json")
    write_result(drawings.path(name), Result("finished"))
    PainterWatch(settings, drawings).look()
    assert drawings.one(name).state == "finished"
    assert drawings.queue.started_jobs() == []
