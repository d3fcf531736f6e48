"""The command `studio`."""

import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffgraft.cli.studio import studio
from diffgraft.errors import DiffgraftError
from diffgraft.files import exclusive_lock
from diffgraft.web.serve import serve
from diffgraft.web.settings import Settings


def test_without_its_packages_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(DiffgraftError, match=r"pip install 'diffgraft\[studio\]'"):
        serve(Settings(tmp_path), lambda: None)
    assert list(tmp_path.iterdir()) == []


def test_a_library_has_one_studio(settings: Settings) -> None:
    with exclusive_lock(settings.state_folder), pytest.raises(DiffgraftError, match="Another studio uses"):
        serve(settings, lambda: pytest.fail("it listens"))


def test_a_port_that_is_taken_is_told(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DiffgraftError, match=f"cannot listen on 127.0.0.1, port {port} .*choose another --port"):
            serve(replace(settings, port=port), lambda: pytest.fail("it listens"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "needs a password: set the environment variable DIFFGRAFT_STUDIO_PASSWORD"),
        ({"folder": [Path("nowhere")]}, "--folder nowhere is no folder"),
    ],
)
def test_the_command_refuses_an_open_studio_and_missing_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.delenv("DIFFGRAFT_STUDIO_PASSWORD", raising=False)
    monkeypatch.setattr("diffgraft.web.serve.serve", lambda *_: pytest.fail("it serves"))
    with pytest.raises(DiffgraftError, match=message):
        studio(tmp_path, **options)


def test_the_command_serves_what_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[Settings] = []

    def stand_in(settings: Settings, ready: Callable[[], None]) -> None:
        served.append(settings)
        ready()

    monkeypatch.setenv("DIFFGRAFT_STUDIO_PASSWORD", "secret")
    monkeypatch.setattr("diffgraft.web.serve.serve", stand_in)
    studio(tmp_path / "runs", folder=[tmp_path], host="::", port=8000, name=["Studio.Example"])
    (found,) = served
    assert (found.root, found.folders) == (tmp_path / "runs", (tmp_path,))
    assert (found.host, found.port, found.password, found.hosts) == ("::", 8000, "secret", ("studio.example",))
    assert "http://[::]:8000" in capsys.readouterr().out
    assert "secret" not in repr(found)
