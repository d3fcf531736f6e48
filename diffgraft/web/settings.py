"""Settings of the studio: its folders, who may reach it, and its limits."""

import ipaddress
import sys
from dataclasses import dataclass, field
from pathlib import Path

from diffgraft.errors import DiffgraftError

DEFAULT_PORT = 7870
PASSWORD_VARIABLE = "DIFFGRAFT_STUDIO_PASSWORD"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """Bounds on what a client can ask for."""

    body: int = 2**20
    """Bytes of a request that is no upload"""
    upload: int = 2**29
    """Bytes of an upload"""
    file: int = 2**26
    """Bytes of one uploaded file"""
    files: int = 500
    """Files of an upload"""
    queue: int = 50
    """Jobs that wait"""
    jobs_per_minute: int = 20
    """Jobs that are accepted in a minute"""
    drawings_per_minute: int = 60
    """Drawings that are accepted in a minute"""
    pictures: int = 200
    """Pictures of a plot"""
    logins_per_minute: int = 10
    """Wrong passwords in a minute, after which all are refused for a while"""
    viewers: int = 200
    """Streams of events that are open at once"""
    command_seconds: float = 300.0
    """Seconds that a plan, or making a file of others, may take"""


@dataclass(frozen=True)
class Settings:
    """Settings of one studio."""

    root: Path
    """The library folder: runs, uploads and the queue"""
    folders: tuple[Path, ...] = ()
    """Further folders whose pictures, adapters and bases may be used"""
    host: str = "127.0.0.1"
    """Address that the server listens on"""
    port: int = DEFAULT_PORT
    password: str = field(default="", repr=False)
    """Password; empty: none, which is only allowed on this computer's own address"""
    hosts: tuple[str, ...] = ()
    """Further host names under which the studio is reached, such as that of a proxy"""
    command: tuple[str, ...] = (sys.executable, "-m", "diffgraft")
    """Program that trains and plans"""
    painter: tuple[str, ...] = (sys.executable, "-m", "diffgraft.web.painter")
    """Program that draws"""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Refuse an open studio.

        Raises:
            DiffgraftError: the studio would be reachable from other computers without a password.
        """
        if not self.password and not self.is_local:
            raise DiffgraftError(
                f"--host {self.host} lets other computers reach the studio, which needs a password: set the "
                f"environment variable {PASSWORD_VARIABLE}, or leave --host out."
            )

    @property
    def is_local(self) -> bool:
        """Whether only this computer can reach the server."""
        return self.host in _LOOPBACK

    @property
    def state_folder(self) -> Path:
        """Folder of the queue."""
        return self.root / ".studio"

    @property
    def uploads(self) -> Path:
        """Folder of uploaded pictures, with a folder for each upload."""
        return self.root / "uploads"

    def is_own_host(self, name: str) -> bool:
        """Whether a request for the host `name` (without port) is meant for this studio.

        A page of another site can have its name point to this computer (DNS rebinding); its requests then arrive with
        its own name. An address in numbers cannot be rebound.
        """
        if name in (*_LOOPBACK, self.host, *self.hosts):
            return True
        return not self.is_local and _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
