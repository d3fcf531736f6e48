"""The pages that draw: the form with its gallery, one drawing, and two pictures side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from diffgraft.web.drawings import SAMPLERS, Drawing, DrawingRequest, MixedAdapter
from diffgraft.web.library import adapters, find_adapter, read_recipe
from diffgraft.web.paths import UnknownPathError
from diffgraft.web.studio import Studio

_SHOWN = 12
"""Drawings of a page of the gallery"""
_AXES = ("seed", "prompt", "steps", "guidance", "sampler", "schedule", "size", "negative", "adapter")
_MAX_TOLD = 20_000
Page = Callable[..., HTMLResponse]


@dataclass(frozen=True)
class ComparedPicture:
    """One of two pictures on the page that compares them."""

    label: str
    """Name of the text that tells the side"""
    picture: str
    """``ID/FILE`` of the picture"""
    other: str
    """That of the other side"""
    drawing: Drawing
    name: str
    differences: list[tuple[str, str]]
    """What it was drawn with, where that differs from the other side"""


def add_drawing_pages(router: APIRouter, studio: Studio, page: Page) -> None:
    """Add the pages; `page` makes one from the request, the name of a template, and its content."""
    drawings, root = studio.drawings, studio.settings.root

    @router.get("/draw")
    def draw(request: Request, adapter: str = "", again: str = "", before: str = "") -> Response:
        drawings.is_wanted.set()
        shown = drawings.newest(_SHOWN + 1, before)
        files = [each.path for each in adapters(root)]
        given = drawings.one(again).request if again else _begun(studio, adapter)
        files += [mixed.file for mixed in given.adapters if mixed.file not in files]
        bases = ["tiny", *(run.recipe["base"] for run in studio.runs()), given.base]
        return page(
            request,
            "draw.html",
            given=given,
            drawings=shown[:_SHOWN],
            older=shown[_SHOWN - 1].id if len(shown) > _SHOWN else "",
            files=files,
            samplers=SAMPLERS,
            bases=[base for base in dict.fromkeys(bases) if base],
            axes=_AXES,
        )

    @router.get("/drawings/{drawing}")
    def show(request: Request, drawing: str, part: str = "") -> Response:
        found = drawings.one(drawing)
        if part == "card":
            return page(request, "card.html", drawing=found)
        told = {name: _told(studio, drawing, name) for name in found.pictures}
        return page(request, "drawing.html", drawing=found, told={name: text for name, text in told.items() if text})

    @router.get("/compare")
    def compare(request: Request, first: str, second: str) -> Response:
        pictures = [_picture(studio, picture) for picture in (first, second)]
        settings = [_settings(drawing, name) for drawing, name in pictures]
        sides = [
            ComparedPicture(
                label,
                picture,
                other,
                *pictures[place],
                [(key, value) for key, value in settings[place].items() if value != settings[1 - place][key]],
            )
            for place, (label, picture, other) in enumerate((("left", first, second), ("right", second, first)))
        ]
        preferences = studio.preferences
        return page(request, "compare.html", sides=sides, pairs=preferences.count, folder=str(preferences.folder))


def _begun(studio: Studio, adapter: str) -> DrawingRequest:
    """Return what the form begins with: a prompt with the trigger and class of a run's adapter, on its base.

    Raises:
        DiffgraftError: there is no such adapter.
    """
    if not adapter:
        return DrawingRequest(prompt="")
    root = studio.settings.root
    find_adapter(root, adapter)
    recipe = read_recipe(root / adapter.partition("/")[0]) if "/" in adapter else {}
    words = [str(recipe.get(key) or "")[:200] for key in ("trigger", "subject")]
    prompt = " ".join(["a", *filter(None, words)]) if any(words) else ""
    base = str(recipe.get("base") or "tiny")[:1000]
    return DrawingRequest(prompt=prompt, base=base, adapters=[MixedAdapter(file=adapter)])


def _picture(studio: Studio, picture: str) -> tuple[Drawing, str]:
    drawing, _, name = picture.partition("/")
    studio.drawings.picture(drawing, name)
    return studio.drawings.one(drawing), name


def _settings(drawing: Drawing, name: str) -> dict[str, str]:
    """Return what a picture was drawn with, as text."""
    request = drawing.request.model_dump(exclude={"count", "axes"})
    if name in drawing.pictures and not drawing.request.axes:
        request["seed"] += drawing.pictures.index(name)
    request["adapters"] = ", ".join(f"{adapter.file} × {adapter.strength:g}" for adapter in drawing.request.adapters)
    return {key: _text(value) for key, value in request.items()}


def _text(value: Any) -> str:
    return "–" if value in (None, "", []) else str(value)[:500]


def _told(studio: Studio, drawing: str, name: str) -> str:
    """Return what a picture's file tells of how it was drawn; empty if it tells nothing."""
    try:
        with Image.open(studio.drawings.picture(drawing, name), formats=["PNG"]) as image:
            image.load()
            return str(image.info.get("parameters", ""))[:_MAX_TOLD]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, UnknownPathError):
        return ""
