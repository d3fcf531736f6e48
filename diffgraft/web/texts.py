"""Texts of the pages in English, German and Chinese, from one catalogue."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from starlette.requests import Request

LANGUAGES = {"en": "English", "de": "Deutsch", "zh": "中文"}
"""Code of a language → its own name"""
COOKIE = "diffgraft_language"


@cache
def catalogue() -> Mapping[str, Mapping[str, str]]:
    """Return name of a text → language → text."""
    texts: dict[str, dict[str, str]] = yaml.safe_load((Path(__file__).parent / "texts.yaml").read_text("utf-8"))
    return texts


@dataclass(frozen=True)
class Texts:
    """The texts of the pages in one language."""

    language: str

    def __call__(self, name: str, /, **values: object) -> str:
        """Return the text called `name`, with {placeholders} filled in."""
        text = catalogue()[name][self.language]
        return text.format(**values) if values else text

    def of_scripts(self) -> dict[str, str]:
        """Return the texts that scripts show, whose names begin with ``js_``, without that beginning."""
        found = catalogue().items()
        return {name.removeprefix("js_"): texts[self.language] for name, texts in found if name.startswith("js_")}


def language_of(request: Request) -> str:
    """Return the language that a request asks for: by `lang`, its cookie, or the browser's preference."""
    for chosen in (request.query_params.get("lang"), request.cookies.get(COOKIE)):
        if chosen in LANGUAGES:
            return chosen
    weighted = []
    for place, word in enumerate(request.headers.get("accept-language", "")[:200].split(",")):
        code, _, quality = word.strip().partition(";q=")
        weighted.append((-_number(quality), place, code.partition("-")[0].lower()))
    return next((code for _, _, code in sorted(weighted) if code in LANGUAGES), "en")


def _number(text: str) -> float:
    try:
        return float(text or 1)
    except ValueError:
        return 0.0
