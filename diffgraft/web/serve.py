"""The server of the studio."""

import socket
from collections.abc import Callable

from diffgraft.errors import DiffgraftError
from diffgraft.web.settings import Settings

_MISSING = "The studio needs some packages more: install them with `pip install 'diffgraft[studio]'`."


def serve(settings: Settings, ready: Callable[[], None]) -> None:
    """Run the studio until it is interrupted; trainings go on after it.

    Args:
        settings: the settings.
        ready: called when the server listens.

    Raises:
        DiffgraftError: packages of the studio are not installed, or another studio uses the library folder.
    """
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise DiffgraftError(_MISSING) from error

    from diffgraft.files import exclusive_lock
    from diffgraft.web.app import create_app

    app = create_app(settings)
    try:
        with exclusive_lock(settings.state_folder):
            pass
    except DiffgraftError as error:
        raise DiffgraftError(
            f"Another studio uses {settings.root}: open its page, or choose another folder."
        ) from error
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise DiffgraftError(
            f"The studio cannot listen on {settings.host}, port {settings.port} ({error.strerror}): choose another "
            "--port."
        ) from error
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=2, server_header=False, proxy_headers=False
    )
    ready()
    with listener:
        uvicorn.Server(config).run(sockets=[listener])
