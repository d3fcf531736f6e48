"""The HTTP API of the studio; its pages use it as well."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, HTTPException, Query, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.files import recipe_names
from diffgraft.web import form
from diffgraft.web.api_drawing import add_drawing_routes
from diffgraft.web.commands import Report
from diffgraft.web.events import end_of_events, start_of
from diffgraft.web.jobs import Job
from diffgraft.web.library import (
    AdapterSummary,
    RunSummary,
    adapters,
    checkpoints_of,
    find_adapter,
    find_run,
    full_report,
    is_running,
    loss_points,
    pictures_of,
    report,
    summarize,
)
from diffgraft.web.operations import OperationReport, OperationRequest
from diffgraft.web.paths import UnknownPathError, confined
from diffgraft.web.pictures import CaptionedPicture, PictureFolder
from diffgraft.web.processes import request_stop
from diffgraft.web.studio import Studio
from diffgraft.web.training import Value

_DOWNLOADS = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".safetensors": "application/octet-stream",
    ".yaml": "text/plain; charset=utf-8",
    ".jsonl": "text/plain; charset=utf-8",
}
"""Suffixes of the files of a run that are sent, and their media types"""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TrainingRequest(_Request):
    """Request: a training to plan or to start."""

    recipe: str
    """Name of a recipe that ships"""
    settings: dict[str, Value] = Field(default_factory=dict)
    """Settings that override it: key → value, nested keys with dots"""
    name: str = ""
    """Name of the run; empty: after the recipe and the time"""


class ResumeRequest(_Request):
    """Request: a run to continue."""

    settings: dict[str, Value] = Field(default_factory=dict)
    """Settings that override those of the run, such as more steps"""
    allow_changes: bool = False
    """Whether to go on although settings differ that affect the steps taken"""


class JudgeRequest(_Request):
    """Request: a run to evaluate, and with which strengths and seeds."""

    strengths: Annotated[
        list[Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]], Field(min_length=1, max_length=10)
    ] = Field(default_factory=lambda: [0.6, 0.8, 1.0, 1.2])
    """Strengths of each of its adapters"""
    seeds: Annotated[int, Field(ge=1, le=32)] = 4
    """Pictures of each prompt"""


class CaptionRequest(_Request):
    """A caption to write beside an uploaded picture."""

    file: str
    caption: str


class RunDetail(BaseModel):
    """A run with its loss curve and files."""

    summary: RunSummary
    metrics: list[dict[str, float]]
    """Metrics of its steps, thinned out if they are many"""
    pictures: list[str]
    """Pictures, relative to the run's folder"""
    checkpoints: list[str]
    last_event: int
    """Id of the newest event; the stream of events goes on after it"""


class Uploaded(BaseModel):
    """Response to an upload: the folder, and why files were refused."""

    folder: str
    refusals: list[str]
    """For each file that was refused, a sentence"""


def api_router(studio: Studio) -> APIRouter:
    """Return the routes of the API."""
    router = APIRouter(prefix="/api")
    _add_runs(router, studio)
    _add_files(router, studio)
    _add_training(router, studio)
    _add_pictures(router, studio)
    add_drawing_routes(router, studio)
    return router


def _add_runs(router: APIRouter, studio: Studio) -> None:
    root = studio.settings.root

    @router.get("/runs")
    def list_runs() -> list[RunSummary]:
        """List the runs of the library, the newest first."""
        return studio.runs()

    @router.get("/runs/{name}")
    def show_run(name: str) -> RunDetail:
        """Show a run."""
        folder = find_run(root, name)
        last = end_of_events(folder)  # before the metrics, so that no step is missed between them and the stream
        return RunDetail(
            summary=summarize(folder, studio.waiting()),
            metrics=loss_points(folder),
            pictures=pictures_of(folder),
            checkpoints=checkpoints_of(folder),
            last_event=last,
        )

    @router.get("/runs/{name}/events", response_class=StreamingResponse)
    def follow_run(
        name: str,
        after: Annotated[int, Query(ge=0)] = 0,
        last_event_id: Annotated[str, Header()] = "",
    ) -> StreamingResponse:
        """Stream the events of a run as server-sent events.

        First those after `after`, or after the header Last-Event-ID, then those that follow, until the run ends. The
        last one is called `end`.
        """
        folder = find_run(root, name)

        def may_follow() -> bool:
            return is_running(folder) or name in studio.waiting()

        return studio.streams.follow(folder, start_of(after, last_event_id), may_follow)

    @router.post("/runs/{name}/stop", status_code=202)
    def stop_run(name: str) -> dict[str, bool]:
        """Ask the training of a run to write a checkpoint and end."""
        if not request_stop(find_run(root, name)):
            raise HTTPException(409, f"No training of {name} runs that this studio started.")
        return {"stopping": True}

    @router.get("/runs/{name}/files/{path:path}", response_class=FileResponse)
    def file_of_run(name: str, path: str) -> FileResponse:
        """Send a file of a run: a picture, an adapter, the recipe or the metrics."""
        folder = find_run(root, name)
        file = confined(folder, path)
        media_type = _DOWNLOADS.get(file.suffix.lower())
        if media_type is None or not file.is_file():
            raise UnknownPathError(f"The run has no file {path[:200]!r} to send.")
        is_picture = media_type.startswith("image/")
        return FileResponse(file, media_type=media_type, filename=None if is_picture else file.name)


def _add_files(router: APIRouter, studio: Studio) -> None:
    root = studio.settings.root

    @router.get("/adapters")
    def list_adapters() -> list[AdapterSummary]:
        """List the adapter files of the library, with reports from their headers."""
        return adapters(root)

    @router.get("/adapters/{path:path}")
    def inspect_adapter(path: str, *, figures: bool = False) -> list[str]:
        """Report what an adapter file holds, as `diffgraft inspect` does; with `figures` from its tensors."""
        file = find_adapter(root, path)
        return list((not figures and report(file)) or full_report(file))

    @router.post("/adapters")
    def make_adapter(request: OperationRequest) -> OperationReport:
        """Make a new file of adapters: convert, resize, combine, or merge into a base."""
        return studio.operations.make(request)


def _add_training(router: APIRouter, studio: Studio) -> None:
    @router.get("/recipes")
    def list_recipes() -> dict[str, str]:
        """List the recipes: name → summary."""
        return recipe_names()

    @router.get("/recipes/{name}")
    def show_recipe(name: str) -> list[form.Field]:
        """List the keys of a recipe with defaults and meanings, the common ones first."""
        if name not in recipe_names():
            raise HTTPException(404, f"There is no recipe {name[:100]!r}.")
        return list(form.fields_of(name))

    @router.post("/plan")
    def plan(request: TrainingRequest) -> Report:
        """Say what a training would do, or why it would be refused; nothing is written."""
        return studio.trainings.plan(request.recipe, request.settings)

    @router.post("/runs", status_code=202)
    def start_run(request: TrainingRequest) -> Job:
        """Queue a training."""
        return studio.trainings.start(request.recipe, request.settings, request.name)

    @router.post("/runs/{name}/resume", status_code=202)
    def resume_run(name: str, request: Annotated[ResumeRequest, Body()]) -> Job:
        """Queue the continuation of a run."""
        return studio.trainings.resume(name, request.settings, allow_changes=request.allow_changes)

    @router.post("/runs/{name}/evaluate", status_code=202)
    def judge_run(name: str, request: Annotated[JudgeRequest, Body()]) -> Job:
        """Queue the evaluation of a run: which of its adapters to use, and at which strength."""
        return studio.trainings.judge(name, request.strengths, request.seeds)

    @router.get("/queue")
    def list_queue() -> list[Job]:
        """List the jobs that wait, in order."""
        return studio.queue.jobs()

    @router.delete("/queue/{job_id}")
    def cancel(job_id: str) -> dict[str, bool]:
        """Remove a waiting job."""
        if not studio.trainings.cancel(job_id):
            raise HTTPException(404, "No job of this id waits; it may have been started.")
        return {"removed": True}


def _add_pictures(router: APIRouter, studio: Studio) -> None:
    pictures, limits = studio.pictures, studio.settings.limits

    @router.get("/pictures")
    def list_picture_folders() -> list[PictureFolder]:
        """List the folders with pictures that trainings may use."""
        return pictures.folders()

    @router.get("/pictures/list")
    def list_pictures(folder: str) -> list[CaptionedPicture]:
        """List the pictures of a folder with their captions."""
        return pictures.listed(folder)

    @router.get("/pictures/thumbnail", response_class=Response)
    def thumbnail(file: str) -> Response:
        """Send a picture, small, as WebP."""
        content = pictures.thumbnail(file)
        return Response(content, media_type="image/webp", headers={"cache-control": "private, max-age=300"})

    @router.put("/pictures/caption")
    def set_caption(request: CaptionRequest) -> dict[str, bool]:
        """Write the caption of an uploaded picture."""
        pictures.set_caption(request.file, request.caption)
        return {"saved": True}

    @router.post("/pictures", openapi_extra={"requestBody": _UPLOAD_BODY})
    async def upload(request: Request) -> Uploaded:
        """Upload pictures, and caption files of the same names, to a folder of the library."""
        async with request.form(max_files=limits.files, max_fields=10) as given:
            files = [item for item in given.getlist("files") if not isinstance(item, str)]
            folder = given.get("folder", "")
            if not files or not isinstance(folder, str):
                raise DiffgraftError("The upload has no files: choose pictures.")
            contents = [(file.filename or "picture", file.file) for file in files]
            path, refusals = await asyncio.to_thread(pictures.upload, folder, contents)
        return Uploaded(folder=path, refusals=refusals)


_UPLOAD_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["files"],
                "properties": {
                    "folder": {"type": "string", "description": "Name of the folder, which may be new"},
                    "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                },
            }
        }
    },
}
"""Schema of an upload; its limits need the form to be read by hand"""
