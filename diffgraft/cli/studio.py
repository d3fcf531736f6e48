"""The command that opens the studio in a browser: studio."""

import os
from pathlib import Path
from typing import Annotated

import typer

from diffgraft.cli.console import say


def studio(
    library: Annotated[Path, typer.Argument(help="Folder of the library: runs, uploads and the queue.")] = Path("runs"),
    folder: Annotated[
        list[Path] | None, typer.Option(help="Another folder whose pictures and bases may be used; repeatable.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; other than this computer's needs a password.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7870,
    name: Annotated[
        list[str] | None, typer.Option(help="Another host name of the studio, such as that of a proxy; repeatable.")
    ] = None,
) -> None:
    """Open the studio: train, watch runs, draw and browse adapters in a browser.

    The environment variable DIFFGRAFT_STUDIO_PASSWORD sets a password, which --host requires.
    """
    from diffgraft.errors import DiffgraftError
    from diffgraft.web.serve import serve
    from diffgraft.web.settings import PASSWORD_VARIABLE, Settings

    folders = tuple(path.expanduser() for path in folder or ())
    if missing := [path for path in folders if not path.is_dir()]:
        raise DiffgraftError(f"--folder {missing[0]} is no folder: give an existing one.")
    settings = Settings(
        library.expanduser().resolve(),
        tuple(path.resolve() for path in folders),
        host,
        port,
        os.environ.get(PASSWORD_VARIABLE, ""),
        tuple(word.lower() for word in name or ()),
    )
    shown = f"[{host}]" if ":" in host else host
    serve(settings, lambda: say(f"The studio: http://{shown}:{port} (Ctrl-C ends it; trainings go on)"))
