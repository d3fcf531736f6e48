"""Trainings: queued, followed, stopped and resumed; they outlive the server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

import diffgraft.demo
from diffgraft.web.jobs import Queue, Scheduler
from diffgraft.web.processes import running_process
from diffgraft.web.settings import Limits, Settings
from tests.web.conftest import client_of

Wait = Callable[[Callable[[], Any]], Any]
TRAIN = {"recipe": "subject", "settings": {"subject": "dog", "images": "uploads/dog"}}


def events_of(client: TestClient, run: str, **headers: str) -> list[tuple[int, dict[str, Any]]]:
    text = client.get(f"/api/runs/{run}/events", headers=headers).text
    found = re.findall(r"^id: (\d+)\ndata: (.*)\n\n", text, re.MULTILINE)
    assert text.endswith("event: end\ndata: {}\n\n")
    return [(int(number), json.loads(data)) for number, data in found]


def steps_in(events: list[tuple[int, dict[str, Any]]]) -> list[int]:
    return [event["step"] for _, event in events if event["event"] == "step"]


def test_a_training_is_queued_followed_and_finished(client: TestClient, settings: Settings) -> None:
    job = client.post("/api/runs", json={**TRAIN, "name": "my dog"}).json()
    assert job["run"] == "my-dog"
    assert "images=uploads/dog" in job["words"]
    assert client.post("/api/runs", json={**TRAIN, "name": "my dog"}).json()["run"] == "my-dog-2"
    events = events_of(client, "my-dog")
    assert steps_in(events) == list(range(1, 21))
    detail = client.get("/api/runs/my-dog").json()
    assert detail["summary"]["state"] == "finished"
    assert detail["metrics"][-1] == {"step": 20, "loss": 0.05}
    assert detail["last_event"] == (settings.root / "my-dog/studio/events.jsonl").stat().st_size
    assert steps_in(events_of(client, "my-dog-2")) == list(range(1, 21))  # after the first one


def test_no_event_is_lost_or_sent_twice_to_many_clients_that_come_back(client: TestClient) -> None:
    client.post("/api/runs", json={**TRAIN, "name": "dog"})
    whole = events_of(client, "dog")
    results: list[list[int]] = []

    def follow(number: int) -> None:
        place = number % len(whole)  # the last event that this client saw
        results.append(
            steps_in(whole[: place + 1] + events_of(client, "dog", **{"last-event-id": str(whole[place][0])}))
        )

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [list(range(1, 21))] * 50
    for strange in ("-1", "x", "9" * 30, "999999"):
        assert steps_in(events_of(client, "dog", **{"last-event-id": strange})) == list(range(1, 21))


def test_a_stopped_training_resumes(client: TestClient, wait_for: Wait) -> None:
    slow = {**TRAIN, "settings": {**TRAIN["settings"], "lr": 0.1, "steps": 1000}, "name": "dog"}  # type: ignore[dict-item]
    client.post("/api/runs", json=slow)
    wait_for(lambda: client.get("/api/runs/dog").json()["summary"]["step"] > 1)
    assert client.post("/api/runs/dog/resume", json={}).status_code == 400  # it runs
    assert client.post("/api/runs/dog/stop").status_code == 202
    wait_for(lambda: client.get("/api/runs/dog").json()["summary"]["state"] == "stopped")
    detail = client.get("/api/runs/dog").json()
    assert "Interrupted" in detail["summary"]["message"]
    assert detail["checkpoints"] == ["checkpoints/step"]
    assert client.post("/api/runs/dog/stop").status_code == 409
    done = detail["summary"]["step"]
    more = {"settings": {"steps": done + 3}, "allow_changes": True}
    assert client.post("/api/runs/dog/resume", json=more).status_code == 202
    wait_for(lambda: client.get("/api/runs/dog").json()["summary"]["state"] == "finished")
    assert steps_in(events_of(client, "dog")) == list(range(1, done + 4))


def test_waiting_jobs_are_listed_removed_and_bounded(settings: Settings) -> None:
    client = client_of(replace(settings, limits=Limits(queue=3)))  # not entered: nothing is started
    runs = [client.post("/api/runs", json={**TRAIN, "name": "dog"}).json()["run"] for _ in range(3)]
    assert client.post("/api/runs", json=TRAIN).status_code == 429
    jobs = client.get("/api/queue").json()
    assert [job["run"] for job in jobs] == runs == ["dog", "dog-2", "dog-3"]
    assert {run["state"] for run in client.get("/api/runs").json()} == {"queued"}
    assert client.delete(f"/api/queue/{jobs[1]['id']}").status_code == 200
    assert client.delete(f"/api/queue/{jobs[1]['id']}").status_code == 404
    assert client.delete("/api/queue/..%2Fx").status_code == 404
    assert not (settings.root / "dog-2").exists()
    again = client_of(settings)  # a restart
    assert [job["run"] for job in again.get("/api/queue").json()] == ["dog", "dog-3"]
    hasty = client_of(replace(settings, limits=Limits(jobs_per_minute=1)))
    assert [hasty.post("/api/runs", json=TRAIN).status_code for _ in range(2)] == [202, 429]


def test_a_refused_training_says_why(client: TestClient, wait_for: Wait) -> None:
    client.post("/api/runs", json={"recipe": "subject", "settings": {"images": ""}, "name": "none"})
    wait_for(lambda: client.get("/api/runs/none").json()["summary"]["state"] == "failed")
    assert client.get("/api/runs/none").json()["summary"]["message"] == "The recipe subject has no images."
    assert "The recipe subject has no images." in client.get("/runs/none").text
    refused = client.post("/api/plan", json={"recipe": "subject"}).json()
    assert refused["refusal"].startswith("The recipe subject has no images")
    assert client.post("/api/plan", json=TRAIN).json() == {
        "lines": ["recipe    subject by lora on tiny"],
        "refusal": "",
    }


def test_one_job_is_started_once_however_often_it_is_launched(settings: Settings, wait_for: Wait) -> None:
    """A server that was killed between starting a process and noting it leaves the job to the next server."""
    client = client_of(settings)
    client.post("/api/runs", json={**TRAIN, "name": "dog"})
    queue = Queue(settings.state_folder)
    schedulers = [Scheduler(settings, queue) for _ in range(3)]
    for scheduler in schedulers:
        scheduler.look()

    def ends() -> bool:
        for scheduler in schedulers:
            scheduler.look()
        return bool(client.get("/api/runs/dog").json()["summary"]["state"] == "finished")

    wait_for(ends)
    assert steps_in(events_of(client, "dog")) == list(range(1, 21))


SERVER = """
import sys
from pathlib import Path
from diffgraft.web.serve import serve
from diffgraft.web.settings import Settings
settings = Settings(Path(sys.argv[1]), port=int(sys.argv[2]), command=tuple(sys.argv[3:]))
serve(settings, lambda: print("ready", flush=True))
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_fifty_clients_at_once_lose_no_event_of_a_running_training(settings: Settings) -> None:
    port, results = free_port(), list[list[int]]()

    def follow() -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/runs/dog/events", timeout=60) as stream:
            results.append([int(step) for step in re.findall(rb'"event": "step", "step": (\d+)', stream.read())])

    (settings.root / "dog" / "studio").mkdir(parents=True)
    Queue(settings.state_folder).add("dog", ("train", "steps=40", "lr=0.05", f"output={settings.root / 'dog'}"))
    words = [sys.executable, "-c", SERVER, str(settings.root), str(port), *settings.command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        threads = [threading.Thread(target=follow) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.terminate()
    assert results == [list(range(1, 41))] * 50


def test_a_training_survives_a_killed_server(settings: Settings, wait_for: Wait) -> None:
    port = free_port()
    queue = Queue(settings.state_folder)
    for name in ("dog", "next"):
        (settings.root / name / "studio").mkdir(parents=True)
        queue.add(name, ("train", "steps=40", "lr=0.06", f"output={settings.root / name}"))
    words = [sys.executable, "-c", SERVER, str(settings.root), str(port), *settings.command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/runs/dog/events", timeout=60) as stream:
            while b'"step": 3' not in stream.readline():
                pass
            server.send_signal(signal.SIGKILL)
    pid = running_process(settings.root / "dog")
    assert pid is not None
    with client_of(settings) as client:
        assert client.get("/api/runs/dog").json()["summary"]["state"] == "running"
        assert steps_in(events_of(client, "dog")) == list(range(1, 41))
        wait_for(lambda: client.get("/api/runs/next").json()["summary"]["state"] == "running")
        client.post("/api/runs/next/stop")


def test_a_process_that_has_its_id_from_another_is_not_taken_for_a_training(settings: Settings) -> None:
    (settings.root / "dog" / "studio").mkdir(parents=True)
    note = {"pid": os.getpid(), "created": time.time() - 10_000}
    (settings.root / "dog" / "studio" / "process.json").write_text(json.dumps(note))
    assert running_process(settings.root / "dog") is None
    assert client_of(settings).post("/api/runs/dog/stop").status_code == 409


def test_a_real_training(settings: Settings) -> None:
    pictures = sorted((Path(diffgraft.demo.__file__).parent / "pictures" / "poodle" / "learn").glob("*.png"))
    real = replace(settings, command=(sys.executable, "-m", "diffgraft"))
    with client_of(real) as client:
        files = [("files", (path.name, path.read_bytes())) for path in pictures[:2]]
        folder = client.post("/api/pictures", data={"folder": "dog"}, files=files).json()["folder"]
        given = {"images": folder, "subject": "dog", "steps": 3, "prior.weight": 0, "previews": False, "batch": 1}
        client.post("/api/runs", json={"recipe": "subject", "settings": given, "name": "dog"})
        events = events_of(client, "dog")
        detail = client.get("/api/runs/dog").json()
        assert detail["summary"]["state"] == "finished", detail
        assert steps_in(events) == [1, 2, 3]
        assert len(detail["metrics"]) == 3
        report = client.get("/api/adapters/dog/adapter.safetensors").json()
        assert report[0].startswith("method   lora")
        assert client.get("/api/runs/dog/files/adapter.safetensors").content[8:9] == b"{"
        page = client.get("/").text
        assert "adapter.safetensors" in page
