"""Entry point of the command line, which starts and exits quickly by skipping imports and cleanup."""

import atexit
import os
import signal
import sys
from io import TextIOWrapper
from typing import NoReturn

from diffgraft.cli.main import main


def run() -> NoReturn:
    """Run the command line and exit with its status: the console script `diffgraft`.

    diffusers and peft import bitsandbytes wherever it is installed, which takes longer than importing torch. It is
    therefore hidden from them until `diffgraft.third_party.import_bitsandbytes` is called. At the end the process exits
    without the interpreter's cleanup of modules, which would take a second.
    """
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]  # None: importing it fails
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a console of another encoding shows what it lacks written out
            stream.reconfigure(errors="backslashreplace")
    # whatever ends the process by a request ends a run as Ctrl-C does: with a checkpoint, and how to go on
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # whoever read it has closed it
            status = status or 1
    os._exit(status if isinstance(status, int) else int(status is not None))
