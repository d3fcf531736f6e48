"""The command `studio`."""

import sys
from pathlib import Path

import pytest

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
