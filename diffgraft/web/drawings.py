"""Drawings: what is asked for, and the folders that hold it.

Each drawing has a folder ``drawings/ID`` with `request.json`, its pictures, and a folder ``studio`` with its events and
at the end `result.json`. Its queue is a folder of job files, as that of trainings is.
"""

import json
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from diffgraft.errors import DiffgraftError
from diffgraft.files import remove_dir, write_text
from diffgraft.web.files_of_runs import FOLDER
from diffgraft.web.jobs import Job, Queue
from diffgraft.web.library import find_adapter
from diffgraft.web.limits import RateLimit, TooManyJobsError
from diffgraft.web.paths import UnknownPathError, check_value, confined
from diffgraft.web.settings import Settings

SAMPLERS = (
    "Euler", "Euler a", "LMS", "Heun", "DPM2", "DPM2 a", "DPM++ 2M", "DPM++ 2M SDE", "DPM++ 2M SDE Heun",
    "DPM++ 3M SDE", "DPM++ 2S a", "DPM++ SDE", "Restart", "UniPC", "DEIS", "PLMS", "LCM", "DDIM",
)  # fmt: skip
"""Names of samplers, here as their module would load PyTorch into the server"""
SHEET = "sheet.png"
"""Name of the file of an X/Y/Z plot"""
_RANDOM = -1
_MAX_SEED = 2**53 - 1
"""Largest seed, which scripts in a browser can still count"""
_ADAPTER_AXIS = "adapter"
State = Literal["queued", "running", "finished", "stopped", "failed"]
Strength = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=10_000)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MixedAdapter(_Request):
    """An adapter in the mixer, with its strengths by part, block and step."""

    file: Annotated[str, Field(max_length=1000, pattern=r"^[^<>:|]+$")]
    """Path relative to the library folder"""
    strength: Strength = 1.0
    text_encoder: Strength | None = None
    """Strength on the text encoders; None: `strength`"""
    blocks: dict[Literal["in", "mid", "out"], Strength] = Field(default_factory=dict)
    """Factors on the strength in the down blocks, the middle one, and the up blocks"""
    start: Share = 0.0
    """Share of the steps after which it begins to act"""
    end: Share = 1.0
    """Share of the steps after which it no longer acts"""

    @property
    def tag(self) -> str:
        """Tag of the prompt for strengths by block or step; empty if the adapter has neither."""
        if not self.blocks and self.start == 0 and self.end == 1:
            return ""
        text = self.strength if self.text_encoder is None else self.text_encoder
        parts = [f"lora:{self.file}:{text:g}:{self.strength:g}"]
        parts += [f"{name}={factor:g}" for name, factor in self.blocks.items()]
        parts += [f"start={self.start:.3f}"] if self.start > 0 else []
        parts += [f"end={self.end:.3f}"] if self.end < 1 else []
        return f"<{':'.join(parts)}>"


class RegionOfDrawing(_Request):
    """A part of the picture with a prompt of its own."""

    prompt: Text
    box: tuple[Share, Share, Share, Share]
    """Left, top, right and bottom, as shares of the picture's width and height"""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0


class AxisOfPlot(_Request):
    """An axis of an X/Y/Z plot."""

    name: Annotated[str, Field(max_length=200, pattern=r"^[^=]*\S[^=]*$")]
    """A setting, `seed`, `prompt`, the name of an adapter, or `adapter` for files of the library"""
    values: Annotated[str, Field(max_length=5000, pattern=r"\S")]
    """Values with commas between them, or a range such as 1-9 (+2)"""


class DrawingRequest(_Request):
    """Request: prompt, settings, adapters and regions of pictures to draw."""

    prompt: Text
    negative: Text = ""
    base: Annotated[str, Field(max_length=1000, min_length=1)] = "tiny"
    adapters: Annotated[list[MixedAdapter], Field(max_length=20)] = Field(default_factory=list)
    count: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of pictures, of which each has the next seed"""
    seed: Annotated[int, Field(ge=_RANDOM, le=_MAX_SEED)] = 0
    """Seed of the first picture; -1: a random one"""
    steps: Annotated[int, Field(ge=1, le=1000)] = 25
    guidance: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = None
    """Scale of classifier-free guidance; None: that of the base's family"""
    width: Annotated[int, Field(ge=8, le=4096)] | None = None
    height: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Size in pixels; None: the base's native size"""
    sampler: Annotated[str, Field(max_length=100)] = "Euler"
    hires: Annotated[float, Field(ge=1, le=4, allow_inf_nan=False)] | None = None
    """Scale of a second pass at a larger size; None: no second pass"""
    regions: Annotated[list[RegionOfDrawing], Field(max_length=16)] = Field(default_factory=list)
    axes: Annotated[list[AxisOfPlot], Field(max_length=3)] = Field(default_factory=list)
    """Axes of a plot; if there are any, one sheet of all combinations is drawn"""


@dataclass(frozen=True)
class PromptProblem:
    """Something in a prompt that is wrong, or not read as it looks."""

    text: str
    start: int
    end: int
    """Places in the prompt of its first character and after its last one"""
    is_error: bool
    field: str = "prompt"
    """Which prompt: `prompt`, `negative`, or `regions.0` and so on"""


@dataclass(frozen=True)
class Result:
    """State of a drawing, with its message and the problems of its prompt."""

    state: State
    message: str = ""
    problems: Sequence[PromptProblem] = ()


@dataclass(frozen=True)
class Drawing:
    """A drawing: its request, state and pictures so far."""

    id: str
    state: State
    request: DrawingRequest
    created: float
    """Time of the request, in seconds since 1970"""
    pictures: tuple[str, ...] = ()
    """Names of its picture files; the n-th has the seed `request.seed` + n"""
    message: str = ""
    """Why it failed"""
    problems: tuple[PromptProblem, ...] = field(default=())

    @property
    def is_open(self) -> bool:
        """Whether pictures may still come."""
        return self.state in ("queued", "running")

    def prompt_of(self, problem: PromptProblem) -> str:
        """Return the prompt that a problem is in."""
        if problem.field.startswith("regions."):
            place = int(problem.field.partition(".")[2])
            return self.request.regions[place].prompt
        return self.request.negative if problem.field == "negative" else self.request.prompt


class Drawings:
    """The drawings of a studio."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.folder = settings.root / "drawings"
        """Folder of all drawings"""
        self.queue = Queue(settings.state_folder / "drawings")
        self._rate = RateLimit(settings.limits.drawings_per_minute)
        self.is_wanted = threading.Event()
        """Set when somebody is about to draw, so that the program is loaded before"""

    def add(self, request: DrawingRequest) -> Drawing:
        """Queue a drawing.

        Raises:
            DiffgraftError: it names a file outside of the studio's folders, or one that does not exist.
            TooManyJobsError: too many drawings wait, or were requested in the last minute.
        """
        self._check(request)
        limits = self._settings.limits
        if len(self.queue.jobs()) >= limits.queue:
            raise TooManyJobsError(f"{limits.queue} drawings wait already: wait for one, or remove one.")
        if not self._rate.take():
            raise TooManyJobsError(f"More than {limits.drawings_per_minute} drawings in a minute: wait a while.")
        if request.seed == _RANDOM:
            request = request.model_copy(update={"seed": secrets.randbelow(2**31)})
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() // 1000 % 10**6:06}-{secrets.token_hex(3)}"
        (self.folder / name / FOLDER).mkdir(parents=True)
        write_text(request_file(self.folder / name), request.model_dump_json())
        self.queue.add(f"{self.folder.name}/{name}", ())
        return self.one(name)

    def one(self, drawing: str) -> Drawing:
        """Return the drawing of an id.

        Raises:
            UnknownPathError: there is none.
        """
        return _read(self.path(drawing), self._job(drawing))

    def path(self, drawing: str) -> Path:
        """Return the folder of a drawing.

        Raises:
            UnknownPathError: there is none.
        """
        if "/" not in drawing and "\\" not in drawing and not drawing.startswith("."):
            with suppress(UnknownPathError):
                confined(self.folder, drawing)
                if request_file(self.folder / drawing).is_file():
                    return self.folder / drawing
        raise UnknownPathError(f"There is no drawing {drawing[:100]!r} in the library.")

    def newest(self, count: int, before: str = "") -> list[Drawing]:
        """Return the newest drawings, of those before the id `before` if one is given."""
        try:
            names = sorted((path.name for path in self.folder.iterdir()), reverse=True)
        except OSError:
            return []
        found: list[Drawing] = []
        for name in names:
            if len(found) == count:
                break
            if not before or name < before:
                with suppress(DiffgraftError):  # a damaged or foreign folder
                    found.append(self.one(name))
        return found

    def picture(self, drawing: str, name: str) -> Path:
        """Return the file of a picture.

        Raises:
            UnknownPathError: there is none.
        """
        folder = self.path(drawing)
        if name in _pictures(folder):
            return confined(folder, name)
        raise UnknownPathError(f"The drawing has no picture {name[:100]!r}.")

    def remove(self, drawing: str) -> None:
        """Remove a drawing with its pictures; one that is being drawn is only stopped.

        Raises:
            UnknownPathError: there is none.
        """
        folder, job = self.path(drawing), self._job(drawing)
        if job is not None and not self.queue.remove(job.id):
            cancel_file(folder).touch()
            return
        remove_dir(folder)

    def may_continue(self, drawing: str) -> bool:
        """Whether events of a drawing may still come."""
        return self._job(drawing) is not None

    def give_up(self, job: Job, why: str) -> None:
        """Note that the drawing of a job failed, unless its result is there."""
        folder = self._settings.root / job.run
        if folder.is_dir() and not result_file(folder).is_file():
            write_result(folder, Result("failed", why))

    def _job(self, drawing: str) -> Job | None:
        name = f"{self.folder.name}/{drawing}"
        waiting = self.queue.jobs()  # before those that were started, as a job only moves there
        return next((job for job in (*self.queue.started_jobs(), *waiting) if job.run == name), None)

    def _check(self, request: DrawingRequest) -> None:
        for adapter in request.adapters:
            find_adapter(self._settings.root, adapter.file)
        check_value((self._settings.root, *self._settings.folders), request.base)
        for axis in request.axes:
            if is_of_adapters(axis):
                for file in files_of(axis):
                    find_adapter(self._settings.root, file)


def files_of(axis: AxisOfPlot) -> tuple[str, ...]:
    """Return the files that are the values of an axis of adapters."""
    return tuple(word for value in axis.values.split(",") if (word := value.strip()))


def is_of_adapters(axis: AxisOfPlot) -> bool:
    """Whether the values of an axis are adapter files."""
    return axis.name.strip() == _ADAPTER_AXIS


def request_file(folder: Path) -> Path:
    """Path of the request of a drawing."""
    return folder / "request.json"


def result_file(folder: Path) -> Path:
    """Path of the result of a drawing."""
    return folder / FOLDER / "result.json"


def cancel_file(folder: Path) -> Path:
    """Path of the file whose existence asks to stop a drawing."""
    return folder / FOLDER / "cancel"


def read_request(folder: Path) -> DrawingRequest:
    """Return the request of a drawing.

    Raises:
        DiffgraftError: it cannot be read.
    """
    try:
        return DrawingRequest.model_validate_json(request_file(folder).read_bytes())
    except (OSError, ValidationError) as error:
        raise DiffgraftError(f"The request of the drawing {folder.name} cannot be read.") from error


def write_result(folder: Path, result: Result) -> None:
    """Write the result of a drawing."""
    write_text(result_file(folder), json.dumps(asdict(result), ensure_ascii=False))


def _is_of(problem: PromptProblem, request: DrawingRequest) -> bool:
    """Whether the prompt of a problem is one of the request."""
    regions = [f"regions.{place}" for place in range(len(request.regions))]
    return problem.field in ("prompt", "negative", *regions)


def _read(folder: Path, job: Job | None) -> Drawing:
    request = read_request(folder)
    result = _result(folder)
    if result is None:
        is_waiting = job is not None and not (folder / FOLDER / "events.jsonl").is_file()
        result = Result("queued" if is_waiting else "running" if job is not None else "failed")
    return Drawing(
        folder.name,
        result.state,
        request,
        request_file(folder).stat().st_mtime,
        _pictures(folder),
        result.message,
        tuple(problem for problem in result.problems if _is_of(problem, request)),
    )


def _result(folder: Path) -> Result | None:
    try:
        given = json.loads(result_file(folder).read_text("utf-8"))
        problems = TypeAdapter(tuple[PromptProblem, ...]).validate_python(given["problems"])
        return Result(TypeAdapter(State).validate_python(given["state"]), str(given["message"]), problems)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return Result("failed", "The result of the drawing cannot be read.")


def _pictures(folder: Path) -> tuple[str, ...]:
    """Return the names of the pictures in a folder: a sheet, or those with numbers in order."""
    if (folder / SHEET).is_file():
        return (SHEET,)
    numbers = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal() and len(path.stem) < 4]
    return tuple(f"{number}.png" for number in sorted(numbers))
