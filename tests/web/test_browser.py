"""The studio in a real browser, from five pictures to a plot, through a reload and a killed server, by keyboard too."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import diffgraft.demo
from tests.web.test_training import free_port

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PICTURES = sorted((Path(diffgraft.demo.__file__).parent / "pictures" / "poodle" / "learn").glob("*.png"))
LONG = 120_000
"""Milliseconds that a program may take to start and work on a busy machine"""

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


class Server:
    """A studio as a user starts it, which can be killed and started again."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        words = [sys.executable, "-m", "diffgraft", "studio", str(self.root), "--port", str(self.port)]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert "The studio: " in self._process.stdout.readline()

    def end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.communicate()
        self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "library")
    server.start()
    yield server
    server.end(signal.SIGINT)


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    with playwright.sync_playwright() as program:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"] if os.geteuid() == 0 else []}
        browser = program.chromium.launch(**options)
        page = browser.new_page(viewport={"width": 1440, "height": 900}, locale="en", base_url=server.address)
        page.set_default_timeout(LONG)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if "Security" in message.text else None)
        yield page
        assert problems == []
        browser.close()


def press(page: Any, selector: str, key: str = "Enter") -> None:
    """Press a key on an element, as somebody without a mouse does."""
    page.locator(selector).first.focus()
    page.keyboard.press(key)


def wait_until(page: Any, condition: str) -> None:
    """Wait until a condition in JavaScript holds; the page's own policy forbids Playwright to look from inside."""
    for _ in range(LONG // 100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"{condition} never held")


def fits(page: Any) -> bool:
    """Whether nothing of a page is beside the screen."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_from_five_pictures_to_a_plot(server: Server, page: Any) -> None:
    page.goto("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    press(page, 'nav a[href="/train"]')

    press(page, "summary:has-text('Upload')")
    page.get_by_label("Name of the folder").fill("poodle")
    page.locator('input[type="file"]').set_input_files([str(path) for path in PICTURES])
    press(page, "#upload button")
    page.wait_for_selector("#pictures figure:nth-child(5) textarea")
    page.locator("#pictures textarea").first.fill("a sks poodle on a meadow")
    page.keyboard.press("Tab")
    wait_until(page, "document.getElementById('status').textContent === 'Saved.'")
    page.reload()
    page.locator("#folder").fill("uploads/poodle")
    page.keyboard.press("Enter")
    wait_until(page, "document.querySelector('#pictures textarea')?.value === 'a sks poodle on a meadow'")

    for key, value in {"subject": "poodle", "steps": 24, "batch": 1, "prior.weight": 0}.items():
        page.locator(f'[data-key="{key}"]').evaluate("(field, value) => { field.value = value; }", str(value))
    page.locator('[data-key="previews"]').evaluate("(box) => { box.checked = false; }")
    page.locator("#run-name").fill("poodle")
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs/poodle")
    wait_until(page, "/step [1-9]/.test(document.getElementById('step').textContent)")
    page.reload()
    page.wait_for_selector("#loss polyline", state="attached")
    server.end(signal.SIGKILL)
    server.start()
    page.wait_for_selector(".state.finished")
    assert "step 24 of 24" in page.inner_text("#step")

    press(page, "text=Draw with it")
    page.wait_for_selector("#mixer .mixed")
    assert page.locator("[name=prompt]").input_value() == "a sks poodle"
    press(page, '[data-of="strength"]', "ArrowLeft")
    assert page.locator("#mixer output").first.inner_text() == "0.95"
    page.locator("[name=prompt]").fill("a (sks poodle")
    page.wait_for_selector("#problems mark")
    assert "never closed" in page.inner_text("#problems .wrong small")
    page.locator("[name=prompt]").fill("a sks poodle <lora:nobody:1>")
    page.locator("[name=steps]").fill("2")
    page.locator("[name=count]").fill("2")
    page.keyboard.press("Enter")
    page.wait_for_selector("#problems .bad mark")
    assert page.inner_text("#problems mark") == "<lora:nobody:1>"
    page.locator("[name=prompt]").fill("a sks poodle")
    press(page, "#draw .primary")
    page.wait_for_selector(".drawing .state.finished")
    assert page.locator(".drawing").first.locator("img").count() == 2

    for box in page.locator(".drawing").first.locator("[data-compare]").all():
        box.focus()
        page.keyboard.press("Space")
    press(page, "#compare")
    page.wait_for_url("**/compare?*")  # and until its scripts have run
    press(page, "[data-better]")
    wait_until(page, "document.getElementById('pairs').textContent.includes('1')")
    assert len(list((server.root / "preferences" / "rejected").glob("*.png"))) == 1

    page.goto("/draw?adapter=poodle/adapter.safetensors")
    page.locator("[name=steps]").fill("2")
    press(page, "#plot-part summary")
    for axis, (name, values) in enumerate((("poodle", "0, 1"), ("seed", "1-3"))):
        page.locator('[data-axis="name"]').nth(axis).fill(name)
        page.locator('[data-axis="values"]').nth(axis).fill(values)
    page.keyboard.press("Enter")
    page.wait_for_selector(".drawing .sheet img")
    with page.expect_download() as download:
        press(page, ".sheet a[download]")
    with Image.open(download.value.path()) as sheet:
        assert sheet.width > 2 * 128
        assert sheet.height > 3 * 128
    page.set_viewport_size({"width": 390, "height": 844})
    for address in ("/", "/train", "/runs/poodle", "/draw"):
        page.goto(address)
        assert fits(page), address
