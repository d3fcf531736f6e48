"""Program that draws what waits: ``python -m diffgraft.web.painter LIBRARY``. It holds the base between drawings.

The server starts it and knows it by its files alone; one that was killed loses the drawing at hand and nothing else. It
ends when there was nothing to draw for a while, sooner if the server has ended.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import psutil

from diffgraft.errors import DiffgraftError, one_line, wrap_system_errors
from diffgraft.files import exclusive_lock, write_text
from diffgraft.web.drawings import (
    SHEET,
    DrawingRequest,
    PromptProblem,
    Result,
    cancel_file,
    files_of,
    is_of_adapters,
    read_request,
    result_file,
    write_result,
)
from diffgraft.web.files_of_runs import events_file, process_file
from diffgraft.web.jobs import Job, Queue
from diffgraft.web.settings import Limits

if TYPE_CHECKING:
    from diffgraft.generation.session import Session
    from diffgraft.generation.sheets import Axis

_PAUSE = 0.05
"""Seconds between two looks at the queue"""
_IDLE, _IDLE_ALONE = 600.0, 20.0
"""Seconds without a drawing after which the program ends: with its server, and after that has ended"""


class Painter:
    """Draws the jobs of a queue with one base after the other."""

    def __init__(self, root: Path) -> None:
        import diffgraft.generation.session  # noqa: F401  (takes seconds, in which somebody still writes a prompt)

        self._root, self._queue = root, Queue(root / ".studio" / "drawings")
        self._base = ""
        self._session: Session | None = None

    def run(self) -> None:
        """Draw what waits, until nothing did for a while."""
        server, since = os.getppid(), time.monotonic()
        while time.monotonic() - since < (_IDLE if os.getppid() == server else _IDLE_ALONE):
            if (job := self._claim()) is None:
                time.sleep(_PAUSE)
                continue
            self._do(job)
            since = time.monotonic()

    def _claim(self) -> Job | None:
        for job in self._queue.jobs():
            try:
                self._queue.file(job).rename(self._queue.started / f"{job.id}.json")
            except FileNotFoundError:  # it was removed
                continue
            return job
        return None

    def _do(self, job: Job) -> None:
        """Draw a job and write how it ended; nothing that goes wrong in it ends the program."""
        folder = self._root / job.run
        if folder.is_dir() and not result_file(folder).is_file():
            with events_file(folder).open("a", encoding="utf-8") as events:
                result = self._result(folder, events)
                write_result(folder, result)
        self._queue.forget(job)

    def _result(self, folder: Path, events: TextIO) -> Result:
        from diffgraft.progress import StoppedError

        try:
            with _reported(folder, events):
                request = read_request(folder)
                return self._draw(request, folder)
        except StoppedError:
            return Result("stopped")
        except DiffgraftError as error:
            return Result("failed", one_line(error, 1200))
        except Exception as error:  # the next drawing may succeed
            traceback.print_exc()
            return Result("failed", f"The drawing failed: {one_line(error)}")

    @wrap_system_errors
    def _draw(self, request: DrawingRequest, folder: Path) -> Result:
        from diffgraft.generation.metadata import save_drawing
        from diffgraft.generation.regions import Region
        from diffgraft.generation.settings import DrawSettings, Hires
        from diffgraft.generation.sheets import Cell, draw_sheet
        from diffgraft.progress import Artifact, emit

        session = self._prepared(request)
        problems = self._problems(request)
        if errors := [problem for problem in problems if problem.is_error]:
            return Result("failed", errors[0].text, problems)
        settings = DrawSettings(
            size=None if request.width is None or request.height is None else (request.width, request.height),
            steps=request.steps,
            guidance=request.guidance,
            negative=request.negative,
            sampler=request.sampler.lower(),
            hires=None if request.hires is None else Hires(request.hires),
            regions=tuple(Region(region.prompt, region.box, weight=region.weight) for region in request.regions),
        )
        tags = " ".join(tag for adapter in request.adapters if (tag := adapter.tag))
        prompt = f"{request.prompt} {tags}" if tags else request.prompt
        if request.axes:
            sheet = draw_sheet(session, Cell(prompt, request.seed, settings), _axes(request))
            emit(Artifact("drawing", save_drawing(sheet, folder / SHEET)))
            return Result("finished", "", problems)
        seeds = range(request.seed, request.seed + request.count)
        session.draw(
            prompt,
            seeds,
            settings,
            on_picture=lambda number, image: emit(
                Artifact("drawing", save_drawing(image, folder / f"{number + 1}.png"))
            ),
        )
        return Result("finished", "", problems)

    def _prepared(self, request: DrawingRequest) -> "Session":
        """Return a session of the base with the adapters of the mixer in use."""
        from diffgraft.generation.adapter_library import usual_name

        session = self._of_base(request.base)
        session.close()
        for adapter in request.adapters:
            file = self._root / adapter.file
            session.library.names[adapter.file] = file
            if not adapter.tag:
                strength: float | Mapping[str, float] = adapter.strength
                if adapter.text_encoder is not None:
                    strength = {session.base.family.denoiser: adapter.strength, "text_encoder": adapter.text_encoder}
                session.use(adapter.file, strength, usual_name(str(file)))
        return session

    def _of_base(self, base: str) -> "Session":
        from diffgraft.bases import load_base
        from diffgraft.devices import device_of, dtype_of
        from diffgraft.generation.session import Session
        from diffgraft.progress import phase

        if self._session is None or self._base != base:
            if self._session is not None:
                self._session.close()
            self._session = None  # before the next one is loaded, as both may not fit
            with phase("loading the base"):
                device = device_of()
                loaded = load_base(base, dtype_of("", device)).to(device)
            self._session, self._base = Session(loaded, self._root), base
            self._session.library.takes_paths = False  # prompts name what is in the library
        return self._session

    def _problems(self, request: DrawingRequest) -> tuple[PromptProblem, ...]:
        from diffgraft.generation.grammar.problems import problems_of

        assert self._session is not None
        prompts = {"prompt": request.prompt, "negative": request.negative}
        prompts |= {f"regions.{place}": region.prompt for place, region in enumerate(request.regions)}
        find = self._session.library.find
        return tuple(
            PromptProblem(found.text, found.start, found.end, found.is_error, name)
            for name, prompt in prompts.items()
            for found in problems_of(prompt, request.steps, find=find)
        )


def _axes(request: DrawingRequest) -> "list[Axis]":
    """Return the axes of a plot.

    Raises:
        DiffgraftError: one cannot be read, or there would be too many pictures.
    """
    from math import prod

    from diffgraft.generation.sheets import Axis

    axes = [
        Axis("adapter", files_of(axis)) if is_of_adapters(axis) else Axis.read(f"{axis.name.strip()}={axis.values}")
        for axis in request.axes
    ]
    count, most = prod(len(axis.values) for axis in axes), Limits().pictures
    if count > most:
        raise DiffgraftError(f"The plot would have {count} pictures: at most {most} are drawn. Give fewer values.")
    return axes


@contextmanager
def _reported(folder: Path, events: TextIO) -> Iterator[None]:
    """Write events to the file `events`, and stop within the block when the drawing is cancelled."""
    from diffgraft.progress import Control, Event, JsonLines, reporting

    control, lines, cancel = Control(), JsonLines(events), cancel_file(folder)

    def report(event: Event) -> None:
        lines(event)
        if cancel.exists():
            control.stop()

    with reporting(report, control):
        yield


def main(root: Path) -> None:
    """Draw for the studio of the library `root`, unless another program already does."""
    home = root / ".studio" / "painter"
    try:
        with exclusive_lock(home):
            process_file(home).parent.mkdir(parents=True, exist_ok=True)
            note = {"pid": os.getpid(), "created": psutil.Process().create_time()}
            write_text(process_file(home), json.dumps(note))
            Painter(root).run()
    except DiffgraftError as error:  # another one draws
        print(error, file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
