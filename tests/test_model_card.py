"""Model cards and their upload: what the hub needs is in the head, and each failure is one sentence."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import diffgraft as dg
from diffgraft.errors import DiffgraftError
from diffgraft.generation.plots import grid
from diffgraft.model_card import make_card
from diffgraft.trainers.run.folder import Run


def head_of(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


@pytest.fixture
def run_copy(short_run: Run, tmp_path: Path) -> Path:
    """A copy of the short run, with samples that have colours of their own."""
    folder = tmp_path / "dog-run"
    shutil.copytree(short_run.folder, folder, ignore=shutil.ignore_patterns("checkpoints"))
    prompts = short_run.recipe.samples()
    colours = ["red", "green", "blue", "yellow"]
    rows = {text: [Image.new("RGB", (64, 64), colour)] * 2 for text, colour in zip(prompts, colours, strict=True)}
    (folder / "samples").mkdir(exist_ok=True)
    grid({text: [Image.new("RGB", (64, 64))] for text in prompts}).save(folder / "samples" / "step-000003.png")
    grid(rows).save(folder / "samples" / "step-000006.png")
    return folder


def test_the_card_of_a_run_has_its_newest_samples(run_copy: Path, short_run: Run) -> None:
    file = dg.card(run_copy)
    assert file == run_copy / "README.md"
    text = file.read_text("utf-8")
    head = head_of(text)
    assert head["instance_prompt"] == "a sks dog"
    assert {"lora", "template:sd-lora", "stable-diffusion", "text-to-image"} <= set(head["tags"])
    assert "base_model" not in head, "tiny is not on the hub"
    assert [entry["text"] for entry in head["widget"]] == short_run.recipe.samples()
    pictures = [Image.open(run_copy / entry["output"]["url"]) for entry in head["widget"]]
    assert [set(picture.get_flattened_data()) for picture in pictures] == [
        {(255, 0, 0)}, {(0, 128, 0)}, {(0, 0, 255)}, {(255, 255, 0)},
    ]  # fmt: skip
    assert "card-images/before-after.png" in text
    assert "steps=6" in text
    assert "from_pretrained" not in text, "diffusers does not know tiny"
    assert str(run_copy) not in text, "paths of this machine stay here"
    with pytest.raises(DiffgraftError, match=r"README\.md already exists"):
        dg.card(run_copy)


def test_the_card_of_a_file_has_given_pictures(short_run: Run, tmp_path: Path) -> None:
    file, picture = tmp_path / "dog.safetensors", tmp_path / "snow.png"
    shutil.copy(short_run.adapter_file, file)
    (info := PngInfo()).add_text("parameters", 'a sks dog: "here"\nin snow\nNegative prompt: none\nSteps: 3')
    Image.new("RGB", (40, 24), "white").save(picture, pnginfo=info)
    found = make_card(file, [picture], "owner/base-1.5", "`rm` <b>")
    head = head_of(found.text)
    assert head["base_model"] == "owner/base-1.5"
    assert "from_pretrained('owner/base-1.5'" in found.text
    assert head["widget"] == [{"text": 'a sks dog: "here" in snow', "output": {"url": "card-images/01.png"}}]
    assert "# \\`rm\\` \\<b\\>\n" in found.text
    assert found.pictures["card-images/01.png"].size == (40, 24)
    assert dg.card(file, output=tmp_path / "new" / "card") == tmp_path / "new" / "card" / "README.md"


def test_cards_of_nothing_are_refused(short_run: Run, tmp_path: Path) -> None:
    (tmp_path / "no.safetensors").write_text("no adapter", "utf-8")
    (tmp_path / "no.png").write_text("no picture", "utf-8")
    with pytest.raises(DiffgraftError, match="There is no adapter at"):
        dg.card(tmp_path)
    with pytest.raises(DiffgraftError, match=r"no\.safetensors"):
        dg.card(tmp_path / "no.safetensors")
    with pytest.raises(DiffgraftError, match="cannot be read as a picture"):
        make_card(short_run.adapter_file, [tmp_path / "no.png"])
    with pytest.raises(DiffgraftError, match="must be an id on the hub"):
        make_card(short_run.adapter_file, base_model="https://example.org/x")


@dataclass
class Hub:
    """What a stand-in for the hub answers, and what it was sent."""

    address: str = ""
    refusal: tuple[int, str] | None = None
    created: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    files: dict[str, bytes] = field(default_factory=dict)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server on this machine that takes repositories and commits as the hub does."""
    from huggingface_hub import constants

    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length") or 0))
            found.tokens.add(self.headers.get("authorization", ""))
            if found.refusal is not None:
                self._answer(found.refusal[0], {"error": found.refusal[1]})
            elif self.path == "/api/repos/create":
                found.created.append(json.loads(content))
                self._answer(200, {"url": f"{found.address}/me/dog", "id": "me/dog", "name": "me/dog"})
            elif self.path == "/api/validate-yaml":
                self._answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                asked = json.loads(content)["files"]
                kinds = [{"path": own["path"], "uploadMode": "regular", "shouldIgnore": False} for own in asked]
                self._answer(200, {"files": kinds})
            elif "/commit/" in self.path:
                for line in content.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        found.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                done = {"commitUrl": f"{found.address}/me/dog/commit/5f", "commitOid": "5f", "success": True}
                self._answer(200, done)
            else:
                self._answer(404, {"error": self.path})

        def do_GET(self) -> None:
            self._answer(404, {"error": self.path})

        def _answer(self, status: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    found.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", found.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def with_card(short_run: Run, tmp_path: Path) -> Path:
    """An adapter with a card beside it."""
    (tmp_path / "README.md").write_text("a card", "utf-8")
    return Path(shutil.copy(short_run.adapter_file, tmp_path / "dog.safetensors"))


def test_a_run_is_uploaded_with_its_card_and_nothing_else(run_copy: Path, hub: Hub) -> None:
    assert dg.push(run_copy, "me/dog") == f"{hub.address}/me/dog"
    (created,) = hub.created
    assert (created["organization"], created["name"], created["visibility"]) == ("me", "dog", "private")
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.files["adapter.safetensors"] == (run_copy / "adapter.safetensors").read_bytes()
    pictures = {f"card-images/{name}.png" for name in ("01", "02", "03", "04", "before-after")}
    assert set(hub.files) == {"adapter.safetensors", "README.md", *pictures}
    assert "# dog\n" in hub.files["README.md"].decode()
    assert not (run_copy / "README.md").exists()


def test_a_card_that_was_edited_is_uploaded_as_it_is(run_copy: Path, hub: Hub) -> None:
    (run_copy / "README.md").write_text("my own words", "utf-8")
    dg.push(run_copy, "me/dog", public=True)
    assert hub.created[0]["visibility"] == "public"
    assert hub.files["README.md"] == b"my own words"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "does not accept the token"),
        (403, "may not write to me on the hub"),
        (400, r"refused the upload to me/dog \(status 400"),
    ],
)
def test_a_refusal_is_one_sentence(with_card: Path, hub: Hub, status: int, message: str) -> None:
    hub.refusal = (status, "no")
    with pytest.raises(DiffgraftError, match=message) as error:
        dg.push(with_card, "me/dog")
    assert "\n" not in str(error.value)
    assert "hf_secret" not in str(error.value)


def test_without_token_name_or_network_nothing_is_uploaded(
    with_card: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with pytest.raises(DiffgraftError, match="must be OWNER/NAME, such as your-name/my-dog"):
        dg.push(with_card, "my dog")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(DiffgraftError, match="The hub cannot be reached"):
            dg.push(with_card, "me/dog")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(DiffgraftError, match="switched off by HF_HUB_OFFLINE"):
            dg.push(with_card, "me/dog")
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.get_token", lambda: None)
        with pytest.raises(DiffgraftError, match="There is no token for the hub"):
            dg.push(with_card, "me/dog")
    assert hub.created == []
