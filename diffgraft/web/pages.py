"""The pages of the studio, made on the server; scripts only send forms and draw what happens live."""

from functools import cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Form
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response

from diffgraft.trainers.recipe.files import recipe_names
from diffgraft.web import form, guard
from diffgraft.web.draw_pages import add_drawing_pages
from diffgraft.web.library import adapters, checkpoints_of, find_run, is_running, pictures_of, summarize
from diffgraft.web.operations import FORMATS, KINDS
from diffgraft.web.paths import UnknownPathError, confined
from diffgraft.web.studio import Studio
from diffgraft.web.texts import COOKIE, LANGUAGES, Texts, language_of
from diffgraft.web.training import EVALUATION

_OF_REPORTS = {
    "content-security-policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox"
}
"""Headers of an evaluation's page, which holds its style and pictures itself and may neither run nor load anything"""
_YEAR = 365 * 24 * 3600


@cache
def _templates() -> Environment:
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    return Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _page(request: Request, template: str, status: int = 200, **content: Any) -> HTMLResponse:
    texts = Texts(language_of(request))
    page = _templates().get_template(template)
    shared = {"t": texts, "languages": LANGUAGES, "path": request.url.path, "scripts": texts.of_scripts()}
    response = HTMLResponse(page.render(**shared, **content), status)
    if request.query_params.get("lang") in LANGUAGES:
        response.set_cookie(COOKIE, texts.language, max_age=_YEAR, samesite="strict", httponly=True)
    return response


def error_page(request: Request, message: str, status: int) -> HTMLResponse:
    """Return a page with an error."""
    return _page(request, "error.html", status, message=message)


def page_router(studio: Studio) -> APIRouter:
    """Return the routes of the pages."""
    router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)
    root = studio.settings.root

    @router.get("/")
    def library(request: Request) -> Response:
        jobs = studio.queue.jobs()
        return _page(
            request,
            "library.html",
            runs=studio.runs(),
            adapters=adapters(root),
            jobs=jobs,
            kinds=KINDS,
            formats=FORMATS,
        )

    @router.get("/runs/{name}")
    def run(request: Request, name: str) -> Response:
        folder = find_run(root, name)
        summary = summarize(folder, studio.waiting())
        pictures, checkpoints = pictures_of(folder), checkpoints_of(folder)
        follows = is_running(folder) or summary.state == "queued"
        return _page(
            request,
            "run.html",
            run=summary,
            pictures=pictures,
            checkpoints=checkpoints,
            follows=follows,
            is_judged=(folder / EVALUATION / "evaluation.html").is_file(),
        )

    @router.get("/runs/{name}/evaluation")
    def evaluation(name: str) -> Response:
        file = confined(find_run(root, name), f"{EVALUATION}/evaluation.html")
        return FileResponse(file, media_type="text/html; charset=utf-8", headers=_OF_REPORTS)

    @router.get("/train")
    def train(request: Request, recipe: str = "subject", folder: str = "") -> Response:
        names = recipe_names()
        if recipe not in names:
            raise UnknownPathError(f"There is no recipe {recipe[:100]!r}.")
        fields = form.fields_of(recipe)
        return _page(
            request,
            "train.html",
            recipes=names,
            recipe=recipe,
            folder=folder[:4000],
            folders=studio.pictures.folders(),
            common=[field for field in fields if field.is_common],
            groups=form.grouped(fields),
        )

    add_drawing_pages(router, studio, _page)

    @router.get("/login")
    def login_form(request: Request, to: str = "/") -> Response:
        return _page(request, "login.html", to=_own(to), is_wrong=False)

    @router.post("/login")
    def login(request: Request, password: Annotated[str, Form()] = "", to: Annotated[str, Form()] = "/") -> Response:
        if not studio.door.opens(password):
            return _page(request, "login.html", 403, to=_own(to), is_wrong=True)
        response = RedirectResponse(_own(to), 303)
        is_secure = request.url.scheme == "https"
        response.set_cookie(
            guard.COOKIE, studio.door.token, max_age=_YEAR, samesite="strict", httponly=True, secure=is_secure
        )
        return response

    return router


def _own(path: str) -> str:
    """Return a path of this server; others, to which ``//name`` would lead, become the first page."""
    is_own = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return path if is_own else "/"
