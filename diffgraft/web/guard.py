"""What every request passes first: host, origin, password and size are checked, and pages load nothing of others."""

import hashlib
import hmac
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffgraft.web.limits import RateLimit
from diffgraft.web.settings import Settings

COOKIE = "diffgraft_studio"
_READING = ("GET", "HEAD")
_OPEN = ("/login", "/static/")
"""Beginnings of paths that need no password"""
_HEADERS: Mapping[str, str] = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Door:
    """The password of a studio, and the cookie that stands for it; both survive a restart."""

    def __init__(self, settings: Settings) -> None:
        self._password = settings.password
        salt = hashlib.sha256(str(settings.root.resolve()).encode()).digest()
        key = hashlib.scrypt(self._password.encode(), salt=salt, n=2**14, r=8, p=1) if self._password else b""
        self.token = hmac.new(key, b"diffgraft studio", "sha256").hexdigest()
        """Value of the cookie of those who gave the password"""
        self._failures = RateLimit(settings.limits.logins_per_minute)

    def opens(self, password: str) -> bool:
        """Whether `password` is right; after too many wrong ones none is, for up to a minute."""
        if self._failures.is_reached:
            return False
        if hmac.compare_digest(password.encode(), self._password.encode()):
            return True
        self._failures.take()
        return False

    def admits(self, headers: Headers) -> bool:
        """Whether a request has the cookie, or the password as a bearer token."""
        if not self._password:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self.opens(given.strip().encode("latin-1").decode("utf-8", "replace"))
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.token.encode())


class Guard:
    """ASGI middleware that refuses requests of other sites, of strangers, and of too many bytes."""

    def __init__(self, app: ASGIApp, settings: Settings, door: Door) -> None:
        self._app, self._settings, self._door = app, settings, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise HTTPException(403)  # there are no sockets

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        await self._app(scope, self._bounded(scope, receive), send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if not self._settings.is_own_host(_without_port(host)):
            return _refused(403, f"This studio is not called {host[:100]!r}. Start it with --name and that name.")
        if scope["method"] not in _READING and not _is_own_page(headers, host):
            return _refused(403, "The request comes from a page of another site.")
        if not path.startswith(_OPEN) and not self._door.admits(headers):
            if path.startswith("/api/") or scope["method"] not in _READING:
                return _refused(401, "The studio has a password: log in, or send it as `Authorization: Bearer`.")
            return RedirectResponse(f"/login?to={quote(path)}", 303)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most(scope):
            return _refused(413, f"The request is larger than {self._most(scope):,} bytes.")
        return None

    def _most(self, scope: Scope) -> int:
        limits = self._settings.limits
        return limits.upload if scope["path"] == "/api/pictures" else limits.body

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` that counts bytes, as requests in chunks do not tell their length."""
        received, most = 0, self._most(scope)

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise HTTPException(413, f"The request is larger than {most:,} bytes.")
            return message

        return bounded


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _is_own_page(headers: Headers, host: str) -> bool:
    """Whether a request comes from a page of this studio, or from a program, which sends neither header."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    is_own_origin = origin is None or origin in (f"http://{host}", f"https://{host}")
    return is_own_origin and site in (None, "same-origin", "none")


def _refused(status: int, why: str) -> Response:
    return JSONResponse({"detail": why}, status)
