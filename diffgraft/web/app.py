"""The application: routes, errors and the guard put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

import diffgraft
from diffgraft.errors import DiffgraftError
from diffgraft.files import exclusive_lock
from diffgraft.web.api import api_router
from diffgraft.web.guard import Guard
from diffgraft.web.jobs import Scheduler
from diffgraft.web.limits import TooManyJobsError
from diffgraft.web.pages import error_page, page_router
from diffgraft.web.painting import PainterWatch
from diffgraft.web.paths import UnknownPathError
from diffgraft.web.settings import Settings
from diffgraft.web.studio import Studio


def create_app(settings: Settings) -> FastAPI:
    """Return the application of a studio; while it runs, it starts the jobs of the queues.

    Raises:
        DiffgraftError: when it starts, if another studio uses the library folder.
    """
    studio = Studio.open(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with exclusive_lock(settings.state_folder):
            watchers = [Scheduler(settings, studio.queue), PainterWatch(settings, studio.drawings)]
            for watcher in watchers:
                watcher.start()
            try:
                yield
            finally:
                for watcher in watchers:
                    watcher.end()

    app = FastAPI(
        title="diffgraft studio",
        version=diffgraft.__version__,
        lifespan=lifespan,
        openapi_url="/api/openapi.json",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(api_router(studio))
    app.include_router(page_router(studio))
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))

    @app.exception_handler(DiffgraftError)
    def refuse(request: Request, error: DiffgraftError) -> Response:
        status = 404 if isinstance(error, UnknownPathError) else 429 if isinstance(error, TooManyJobsError) else 400
        if request.url.path.startswith("/api/"):
            return JSONResponse({"detail": str(error)}, status)
        return error_page(request, str(error), status)

    @app.exception_handler(RequestValidationError)
    def explain(_: Request, error: RequestValidationError) -> Response:
        # without what was given, which may be bytes that are no text
        found = [{"loc": list(each["loc"]), "msg": str(each["msg"]), "type": each["type"]} for each in error.errors()]
        return JSONResponse({"detail": found[:20]}, 422)

    @app.exception_handler(HTTPException)
    async def answer(request: Request, error: HTTPException) -> Response:
        if request.url.path.startswith(("/api/", "/static/")):
            return await http_exception_handler(request, error)
        return error_page(request, str(error.detail), error.status_code)

    app.add_middleware(Guard, settings=settings, door=studio.door)
    return app
