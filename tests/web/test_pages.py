"""Pages: all languages, the form of every recipe, nothing from elsewhere, and labels for all fields."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image
from starlette.testclient import TestClient

import diffgraft.web
from diffgraft.trainers.recipe.files import recipe_names
from diffgraft.web.drawings import State
from diffgraft.web.form import COMMON, fields_of
from diffgraft.web.operations import KINDS
from diffgraft.web.settings import Settings
from diffgraft.web.texts import LANGUAGES, catalogue
from tests.web.conftest import client_of

HOME = Path(diffgraft.web.__file__).parent


def test_every_text_is_there_in_every_language() -> None:
    for name, texts in catalogue().items():
        assert set(texts) == set(LANGUAGES), name
        holes = {language: sorted(re.findall(r"\{\w+\}", text)) for language, text in texts.items()}
        assert len({tuple(found) for found in holes.values()}) == 1, name
    used = set()
    for file in (HOME / "templates").glob("*.html"):
        used |= set(re.findall(r'\bt\("(\w+)"', file.read_text("utf-8")))
    used = {name for name in used if not name.endswith("_")}
    by_variable = {"queued", "running", "finished", "stopped", "failed", "trigger", "base", "method", "library"}
    by_variable |= {f"drawing_{state}" for state in get_args(State)}
    by_variable |= {f"draw_{name}" for name in ("count", "seed", "steps", "guidance", "width", "height")}
    by_variable |= {f"mix_{name}" for name in ("text_encoder", "in", "mid", "out", "start", "end")}
    by_variable |= {f"side_{name}" for name in ("left", "top", "right", "bottom")}
    by_variable |= {f"make_{kind}" for kind in KINDS}
    by_variable |= {"left", "right", "left_better", "right_better"}
    in_scripts = {
        f"js_{name}"
        for file in (HOME / "static").glob("*.js")
        for name in re.findall(r"\btexts\.(\w+)", file.read_text("utf-8"))
    }
    assert used | by_variable | in_scripts == set(catalogue())


@pytest.mark.parametrize(
    ("header", "language"),
    [("de-AT,de;q=0.9,en;q=0.5", "de"), ("fr, zh-CN;q=0.4, en;q=0.3", "zh"), ("x;q=?", "en"), ("", "en")],
)
def test_the_language_is_that_of_the_browser_or_chosen(client: TestClient, header: str, language: str) -> None:
    assert f'<html lang="{language}">' in client.get("/", headers={"accept-language": header}).text
    assert '<html lang="de">' in client.get("/?lang=de").text
    assert '<html lang="de">' in client.get("/train", headers={"accept-language": header}).text


class Page(HTMLParser):
    """Collects ids, labels, fields, links, and what CSP forbids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.labelled: set[str] = set()
        self.fields: list[dict[str, str | None]] = []
        self.sources: list[str] = []
        self.inline: list[str] = []
        self._labels = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self._labels += tag == "label"
        if tag == "label" and given.get("for"):
            self.labelled.add(given["for"] or "")
        if tag in ("input", "select", "textarea") and given.get("type") != "hidden" and not self._labels:
            self.fields.append(given)
        self.sources += [given[name] or "" for name in ("src", "href", "action") if name in given]
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        if tag in ("script", "style") and "src" not in given:
            self.inline.append(tag)
        if tag == "img":
            assert "alt" in given

    def handle_endtag(self, tag: str) -> None:
        self._labels -= tag == "label"


def test_pages_load_nothing_from_elsewhere_and_label_their_fields(settings: Settings) -> None:
    (settings.root / "dog").mkdir(parents=True)
    (settings.root / "dog" / "recipe.yaml").write_text("steps: 3\n")
    client = client_of(settings)
    drawing = client.post("/api/drawings", json={"prompt": "a dog"}).json()["id"]
    picture = f"{drawing}/1.png"
    Image.new("RGB", (8, 6)).save(settings.root / "drawings" / picture)
    compared = f"/compare?first={picture}&second={picture}"
    drawn = ("/draw", f"/draw?again={drawing}", f"/drawings/{drawing}", compared)
    for path in ("/", "/train", "/runs/dog", "/login", "/runs/none", *drawn):
        page = Page(client.get(path).text)
        assert page.inline == [], path
        assert all(source.startswith(("/", "?", "#")) and not source.startswith("//") for source in page.sources), path
        assert len(page.ids) == len(set(page.ids)), path
        assert all((field.get("id") in page.labelled) for field in page.fields), path
    for file in (HOME / "static").iterdir():
        addresses = re.findall(r"https?://[\w./]+", file.read_text("utf-8"))
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, file


@pytest.mark.parametrize("recipe", ["subject", "style", "concept", "control", "sdxl-subject"])
def test_the_form_has_every_key_of_a_recipe(client: TestClient, recipe: str) -> None:
    assert recipe in recipe_names()
    fields = fields_of(recipe)
    assert [field.key for field in fields if field.is_common] == [
        key for key in COMMON if key in {field.key for field in fields}
    ]
    for field in fields:
        if field.kind == "choice":
            assert field.value in field.choices, field
        assert field.meaning, field
    by_key = {field.key: field for field in fields}
    assert by_key["flip"].kind == "flag"
    assert by_key["steps"].kind == by_key["resolution"].kind == "number"
    assert by_key["zero_snr"].choices == ("", "true", "false")
    text = client.get(f"/train?recipe={recipe}").text
    assert all(f'data-key="{field.key}"' in text for field in fields)
    assert [field["key"] for field in client.get(f"/api/recipes/{recipe}").json()] == [field.key for field in fields]


def test_the_api_is_documented(client: TestClient) -> None:
    paths = client.get("/api/openapi.json").json()["paths"]
    assert len(paths) >= 15
    for path, methods in paths.items():
        assert path.startswith("/api/")
        assert all(operation["description"] for operation in methods.values()), path
    assert client.get("/docs").status_code == 404
