"""Two thousand requests that nobody means well with: nothing changes, nothing is told, nothing runs."""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi.routing import APIRoute

from diffgraft.web.app import create_app
from diffgraft.web.settings import Settings
from tests.web.conftest import client_of

SECRET = "the contents of a file that is nobody's business"
HTML = "<img src=x onerror=alert(1)>"
WORDS = (
    "../secret.txt", "..%2fsecret.txt", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/etc/passwd", "....//secret.txt",
    "..\\secret.txt", "~root", "dog/../../secret.txt", "\0", "a\0.png", HTML, "'; rm -rf / #", "$(touch pwned)",
    "`touch pwned`", "{{7*7}}", "--resume", "-c", "x" * 3000, "%", "%zz", ".", "..", ".studio", "con",
    "\u202etxt.exe", "\ud7ff\U0010ffff", "__class__", "secret.safetensors", "link/secret.txt", "link.safetensors",
    "9" * 400, "-1", "1e999", "null", "[]", "{}",
)  # fmt: skip
VALUES: tuple[Any, ...] = (*WORDS, None, True, -1, 10**30, 1.5, [], {}, [WORDS[0]], {"x": "../secret.txt"})
BODIES = (b"", b"{", b"[" * 2000, b"\xff\xfe", b'{"recipe":' * 300, b"a=1", b'"' + b"\\u0000" * 500 + b'"', b"nan")
KEYS = (
    "recipe",
    "settings",
    "name",
    "prompt",
    "adapters",
    "base",
    "axes",
    "better",
    "worse",
    "file",
    "caption",
    "seed",
)
FOREIGN: tuple[dict[str, str], ...] = (
    {"host": "evil.example"},
    {"origin": "https://evil.example"},
    {"sec-fetch-site": "cross-site"},
    {"content-length": "99999999999"},
    {"content-type": "text/plain"},
)


def hostile(routes: list[tuple[str, str]], count: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield method, path and further arguments of `count` requests."""
    dice = random.Random(7)
    for number in range(count):
        method, path = routes[number % len(routes)]
        while "{" in path:
            start, end = path.index("{"), path.index("}")
            word = dice.choice(WORDS)
            path = (
                path[:start]
                + (quote(word) if dice.random() < 0.7 or not word.isascii() else quote(word, safe="/%."))
                + path[end + 1 :]
            )
        more: dict[str, Any] = {"headers": {}}
        if dice.random() < 0.3:
            more["params"] = {
                dice.choice(("folder", "file", "after", "before", "again", "adapter", "lang", "to")): dice.choice(WORDS)
            }
        if method in ("POST", "PUT"):
            more["headers"] = {"content-type": "application/json"}
            body = {dice.choice(KEYS): dice.choice(VALUES) for _ in range(dice.randint(0, 4))}
            body |= {"steps": 10**9} if path == "/api/drawings" else {}  # a prompt alone is nothing to refuse
            more["content"] = dice.choice(BODIES) if dice.random() < 0.3 else json.dumps(body).encode()
        if dice.random() < 0.2:
            more["headers"] |= dice.choice(FOREIGN)
        yield method, path, more


def state_of(root: Path) -> str:
    """Return a digest of all files of a folder, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        digest.update(f"{path.relative_to(root)} {path.is_dir()}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def test_two_thousand_hostile_requests_change_tell_and_run_nothing(settings: Settings) -> None:
    (settings.root.parent / "secret.txt").write_text(SECRET)
    (settings.root.parent / "secret.safetensors").write_text(SECRET)
    (settings.root / "dog" / "samples").mkdir(parents=True)
    (settings.root / "dog" / "recipe.yaml").write_text("task: subject\n")
    (settings.root / "link").symlink_to(settings.root.parent)
    (settings.root / "link.safetensors").symlink_to(settings.root.parent / "secret.safetensors")
    app = create_app(settings)
    routes = [
        (method, route.path)
        for route in all_routes(app.routes)
        for method in sorted(route.methods - {"HEAD"})
        if route.path != "/api/plan"  # which starts a program, if only to plan: its words are tested by themselves
    ]
    assert len(routes) > 30
    client = client_of(settings, raise_server_exceptions=False)  # not entered: nothing waits for long
    before = state_of(settings.root.parent)
    wrong = []
    for method, path, more in hostile(routes, 2100):
        answer = client.request(method, path, **more)
        if (
            answer.status_code >= 500
            or SECRET in answer.text
            or (HTML in answer.text and "json" not in answer.headers["content-type"])
        ):
            wrong.append((method, path, more, answer.status_code, answer.text[:200]))
    assert wrong == []
    assert state_of(settings.root.parent) == before
    assert client.get("/api/queue").json() == client.get("/api/drawings").json() == []


def all_routes(routes: Any) -> Iterator[APIRoute]:
    """Yield the routes of an application, those of routers in it too."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        else:
            yield from all_routes(getattr(getattr(route, "original_router", None), "routes", ()))
