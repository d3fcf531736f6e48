"""Requests of other sites, of strangers, and of too many bytes."""

from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from diffgraft.errors import DiffgraftError
from diffgraft.web.settings import Limits, Settings
from tests.web.conftest import client_of

TRAIN = {"recipe": "subject", "settings": {"subject": "dog"}}


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "10.0.0.7:7870", "", "[::2]:80"])
def test_other_hosts_are_refused(client: TestClient, host: str) -> None:
    answer = client.get("/api/runs", headers={"host": host})
    assert answer.status_code == 403
    assert "not called" in answer.json()["detail"]


@pytest.mark.parametrize("host", ["127.0.0.1:7870", "localhost:1234", "[::1]:7870"])
def test_own_hosts_are_served_whatever_the_port(client: TestClient, host: str) -> None:
    assert client.get("/api/runs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": "http://localhost:7870"},
    ],
)
def test_pages_of_other_sites_change_nothing(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/api/runs", json=TRAIN, headers=headers).status_code == 403
    assert client.get("/api/queue").json() == []
    assert client.delete("/api/queue/1", headers=headers).status_code == 403


def test_own_pages_and_programs_change_things(client: TestClient) -> None:
    own = {"origin": "http://localhost:7870", "sec-fetch-site": "same-origin"}
    assert client.post("/api/runs", json=TRAIN, headers=own).status_code == 202
    assert client.post("/api/runs", json=TRAIN).status_code == 202


def test_a_form_of_another_type_starts_nothing(client: TestClient) -> None:
    text = '{"recipe": "subject", "settings": {}}'
    assert client.post("/api/runs", content=text, headers={"content-type": "text/plain"}).status_code == 422


def test_every_answer_forbids_scripts_of_others(client: TestClient) -> None:
    for path in ("/", "/train", "/static/run.js", "/nothing", "/api/runs"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"


def test_without_a_password_only_this_computer_is_served(tmp_path: Path) -> None:
    with pytest.raises(DiffgraftError, match="needs a password"):
        Settings(tmp_path, host="0.0.0.0")
    assert Settings(tmp_path, host="0.0.0.0", password="x").is_own_host("192.168.1.7")


def test_a_password_is_asked_for_and_survives_a_restart(settings: Settings) -> None:
    guarded = replace(settings, password="grün & geheim")
    with client_of(guarded, follow_redirects=False) as client:
        assert client.get("/").headers["location"] == "/login?to=/"
        assert client.get("/api/runs").status_code == 401
        assert client.post("/api/runs", json=TRAIN).status_code == 401
        assert client.get("/api/openapi.json").status_code == 401
        assert client.get("/static/studio.css").status_code == 200
        assert client.post("/login", data={"password": "falsch"}).status_code == 403
        answer = client.post("/login", data={"password": "grün & geheim", "to": "//evil.example"})
        assert answer.headers["location"] == "/"
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert "SameSite=strict" in answer.headers["set-cookie"]
        cookies = dict(client.cookies)
        assert client.get("/").status_code == 200
    with client_of(guarded, cookies=cookies) as later:
        assert later.get("/api/runs").status_code == 200
    with client_of(replace(guarded, password="anders"), cookies=cookies) as later:
        assert later.get("/api/runs").status_code == 401
    with client_of(guarded) as program:
        given = {"authorization": "Bearer grün & geheim".encode()}
        assert program.get("/api/runs", headers=given).status_code == 200  # type: ignore[arg-type]


def test_wrong_passwords_are_bounded(settings: Settings) -> None:
    with client_of(replace(settings, password="right", limits=Limits(logins_per_minute=2))) as client:
        for _ in range(2):
            client.get("/api/runs", headers={"authorization": "Bearer wrong"})
        assert client.get("/api/runs", headers={"authorization": "Bearer right"}).status_code == 401


def test_large_requests_are_refused_with_and_without_a_length(settings: Settings) -> None:
    with client_of(replace(settings, limits=Limits(body=1000))) as client:
        assert client.post("/api/runs", content=b"x" * 2000).status_code == 413
        pieces = (b" " * 100 for _ in range(50))
        json = {"content-type": "application/json"}
        assert client.post("/api/runs", content=pieces, headers=json).status_code == 413
