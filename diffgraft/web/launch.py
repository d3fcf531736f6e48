"""Program that claims a job and starts its training: ``python -m diffgraft.web.launch JOB STARTED RUN COMMAND…``.

The server starts it; what it does survives the server. Moving the job's file is the claim: of two launches of one job,
as after a server was killed at a bad moment, only one can move it, and the other ends. The training is no child of the
server, so that nothing of it hangs on the server's end.
"""

import json
import os
import signal
import sys
from pathlib import Path

import psutil

from diffgraft.files import write_text
from diffgraft.web.files_of_runs import process_file


def launch(job: Path, started: Path, run: Path, command: list[str]) -> None:
    """Claim the job whose file is `job` by moving it to `started`, start `command`, and note its process."""
    try:
        job.rename(started)
    except FileNotFoundError:
        return
    print(json.dumps({"event": "started", "job": started.stem}), file=sys.stderr, flush=True)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a server in the background may have passed on that it is ignored
        os.execv(command[0], command)
    write_text(process_file(run), json.dumps({"pid": pid, "created": psutil.Process(pid).create_time()}))


if __name__ == "__main__":
    _, _job, _started, _run, *_command = sys.argv
    launch(Path(_job), Path(_started), Path(_run), _command)
