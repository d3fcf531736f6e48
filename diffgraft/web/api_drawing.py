"""The part of the HTTP API that draws: drawings, remarks on prompts, and pairs of pictures."""

from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from diffgraft.generation.grammar.notes import place_of, remarks_on
from diffgraft.web.drawings import Drawing, DrawingRequest, PromptProblem
from diffgraft.web.events import start_of
from diffgraft.web.preferences import PreferencePair
from diffgraft.web.studio import Studio

_MAX_DRAWINGS = 100


class PromptRequest(BaseModel):
    """Request: a prompt to check for errors and unknown tokens."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(max_length=10_000)]
    steps: Annotated[int, Field(ge=1, le=1000)] = 25


class PreferenceRequest(BaseModel):
    """Two pictures of which one is better, each as ``ID/FILE``."""

    model_config = ConfigDict(extra="forbid")

    better: Annotated[str, Field(max_length=200)]
    worse: Annotated[str, Field(max_length=200)]


def add_drawing_routes(router: APIRouter, studio: Studio) -> None:
    """Add the routes for drawing to the router of the API."""
    drawings = studio.drawings

    @router.get("/drawings")
    def list_drawings(count: Annotated[int, Query(ge=1, le=_MAX_DRAWINGS)] = 24, before: str = "") -> list[Drawing]:
        """List the newest drawings, or the newest before the id `before`."""
        return drawings.newest(count, before)

    @router.post("/drawings", status_code=202)
    def draw(request: DrawingRequest) -> Drawing:
        """Queue a drawing: pictures of one prompt, or an X/Y/Z plot."""
        return drawings.add(request)

    @router.get("/drawings/{drawing}")
    def show_drawing(drawing: str) -> Drawing:
        """Show a drawing."""
        return drawings.one(drawing)

    @router.get("/drawings/{drawing}/events", response_class=StreamingResponse)
    def follow_drawing(
        drawing: str,
        after: Annotated[int, Query(ge=0)] = 0,
        last_event_id: Annotated[str, Header()] = "",
    ) -> StreamingResponse:
        """Stream the events of a drawing as server-sent events, until it ends; as for runs."""
        folder = drawings.path(drawing)
        return studio.streams.follow(folder, start_of(after, last_event_id), lambda: drawings.may_continue(drawing))

    @router.get("/drawings/{drawing}/files/{name}", response_class=FileResponse)
    def picture_of_drawing(drawing: str, name: str) -> FileResponse:
        """Send a picture of a drawing; it tells how it was drawn."""
        return FileResponse(drawings.picture(drawing, name), media_type="image/png")

    @router.delete("/drawings/{drawing}")
    def remove_drawing(drawing: str) -> dict[str, bool]:
        """Remove a drawing with its pictures; one that is being drawn is only stopped."""
        drawings.remove(drawing)
        return {"removed": True}

    @router.post("/prompt")
    def check_prompt(request: PromptRequest) -> list[PromptProblem]:
        """Tell what in a prompt is not read as it looks, and where; tags are only checked when it is drawn."""
        found = []
        for remark in remarks_on(request.prompt, request.steps):
            start, end = place_of(remark.excerpt, request.prompt)
            found.append(PromptProblem(remark.text, start, end, False))
        return found

    @router.post("/preferences")
    def prefer(request: PreferenceRequest) -> PreferencePair:
        """Keep two pictures of one prompt as a pair, in the folders that the recipe `preferences` learns from."""
        return studio.preferences.keep(request.better, request.worse)
