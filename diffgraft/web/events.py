"""Events of a run, read from its file: each has the position after its line as id, from which reading goes on."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from diffgraft.web.files_of_runs import events_file

_CHUNK = 2**18
"""Bytes that are read at once; a longer line is cut"""
_PAUSE = 0.25
"""Seconds between two looks at a file"""
_PING = 15.0
"""Seconds after which a silent stream says that it lives"""


@dataclass(frozen=True)
class RunEvent:
    """A progress event of a run, as the browser receives it."""

    id: int
    """Position in the file after the event's line"""
    kind: str
    values: Mapping[str, Any]


def source_of(run: Path) -> Path:
    """Return the file of a run's events; for runs that the studio did not start, the file of their metrics."""
    events = events_file(run)
    return events if events.is_file() else run / "metrics.jsonl"


def read_events(run: Path, after: int) -> list[RunEvent]:
    """Return the events after the position `after`, at most a quarter of a megabyte; an unfinished line is left out."""
    try:
        with source_of(run).open("rb") as file:
            file.seek(after)
            content = file.read(_CHUNK)
    except OSError:
        return []
    events: list[RunEvent] = []
    start = 0
    while (end := content.find(b"\n", start)) >= 0:
        events.append(_parse(run, content[start:end], after + end + 1))
        start = end + 1
    if not events and len(content) == _CHUNK:
        events.append(_parse(run, content, after + _CHUNK))
    return events


def end_of_events(run: Path) -> int:
    """Return the position after the events that are there now."""
    try:
        return source_of(run).stat().st_size
    except OSError:
        return 0


def _parse(run: Path, line: bytes, end: int) -> RunEvent:
    text = line.decode("utf-8", "replace").strip()
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        return RunEvent(end, "log", {"text": text[:2000]})
    if "event" not in values:  # a line of metrics
        step = values.pop("step", None)
        return RunEvent(end, "step", {"step": step, "total": None, "values": values})
    kind = str(values.pop("event"))[:40]
    if isinstance(values.get("path"), str):
        values["path"] = _inside(run, values["path"])
    return RunEvent(end, kind, values)


def _inside(run: Path, path: str) -> str | None:
    """Return a path relative to the folder of the run; None if it is elsewhere."""
    try:
        return Path(path).relative_to(run).as_posix()
    except ValueError:
        return None


async def stream(run: Path, after: int, is_running: Callable[[], bool]) -> AsyncIterator[str]:
    """Yield the events after `after` as server-sent events, until the run has ended and all are sent.

    Args:
        run: folder of the run.
        after: id of the last event that the client has; 0: none.
        is_running: whether events may follow.
    """
    yield "retry: 1000\n\n"
    position = 0 if after > end_of_events(run) else after  # the metrics of a resumed run are shorter
    silent, source = 0.0, source_of(run)
    while True:
        if source != source_of(run):  # the studio continues a run that another program began
            position, source = 0, source_of(run)
        # asked before reading, so that the last events of a run that ends in between are not missed
        may_follow = await asyncio.to_thread(is_running)
        events = await asyncio.to_thread(read_events, run, position)
        for event in events:
            yield as_text(event)
        if events:
            position, silent = events[-1].id, 0.0
            continue
        if not may_follow:
            yield f"id: {position}\nevent: end\ndata: {{}}\n\n"
            return
        await asyncio.sleep(_PAUSE)
        silent += _PAUSE
        if silent >= _PING:
            silent = 0.0
            yield ": ping\n\n"


def as_text(event: RunEvent) -> str:
    """Return an event in the format of server-sent events; its type is in the data as well."""
    data = json.dumps({"event": event.kind, **event.values}, ensure_ascii=False)
    return f"id: {event.id}\ndata: {data}\n\n"


class EventStreams:
    """The streams of events that are open, which are bounded in number."""

    def __init__(self, most: int) -> None:
        self._free = threading.BoundedSemaphore(most)

    def follow(self, run: Path, start: int, is_running: Callable[[], bool]) -> StreamingResponse:
        """Return the answer that sends the events of `stream`.

        Raises:
            HTTPException: too many streams are open.
        """
        if not self._free.acquire(blocking=False):
            raise HTTPException(503, "Too many streams of events are open.")

        async def events() -> AsyncIterator[str]:
            try:
                async for text in stream(run, start, is_running):
                    yield text
            finally:
                self._free.release()

        return StreamingResponse(events(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def start_of(after: int, last_event_id: str) -> int:
    """Return the id after which a client wants events: that of its header Last-Event-ID, else `after`."""
    return int(last_event_id) if last_event_id.isdecimal() and len(last_event_id) < 20 else after
