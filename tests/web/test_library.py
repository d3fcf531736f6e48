"""The library: new files made of adapters, and the evaluation of a run."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from diffgraft.adapters.formats import load_adapter
from diffgraft.web.settings import Settings
from tests.web.conftest import client_of

Wait = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def real(settings: Settings) -> Settings:
    """Settings of a studio that runs the real commands, with two adapters in its library."""
    from safetensors.torch import save_file

    (settings.root / "dog").mkdir(parents=True)
    for place, file in enumerate(("dog/adapter.safetensors", "ink.safetensors")):
        torch.manual_seed(place)
        base = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        leaves = {
            "lora_down.weight": torch.randn(4, 32),
            "lora_up.weight": torch.randn(48, 4),
            "alpha": torch.tensor(4.0),
        }
        save_file({f"{base}.{name}": value for name, value in leaves.items()}, settings.root / file)
    return replace(settings, command=(sys.executable, "-m", "diffgraft"))


def test_adapters_are_combined(real: Settings) -> None:
    with client_of(real) as client:
        chosen = [{"file": "dog/adapter.safetensors", "strength": 0.8}, {"file": "ink.safetensors"}]
        made = client.post("/api/adapters", json={"kind": "combine", "adapters": chosen, "name": "../both"}).json()
        assert made["file"] == "both.safetensors", made
        assert any("relative error" in line for line in made["lines"])
        (delta,) = next(iter(load_adapter(real.root / "both.safetensors").deltas.values()))
        assert delta.leaves["lora_down"].shape[0] == 8
        assert "both.safetensors" in client.get("/").text


def test_operations_are_commands(settings: Settings, client: TestClient) -> None:
    root = settings.root
    for file in ("dog/adapter.safetensors", "dog-convert.safetensors"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")

    def made(kind: str, **more: Any) -> tuple[list[str], dict[str, Any]]:
        request = {"kind": kind, "adapters": [{"file": "dog/adapter.safetensors", "strength": -0.5}], **more}
        answer = client.post("/api/adapters", json=request).json()
        return json.loads(answer["lines"][0]), answer

    source = str(root / "dog/adapter.safetensors")
    words, answer = made("convert", to="kohya")
    assert words == ["convert", source, str(root / "dog-convert-2.safetensors"), "--to", "kohya"]
    assert answer["file"] == "dog-convert-2.safetensors"
    words, answer = made("resize")
    assert (answer["file"], answer["refusal"]) == ("", "The size of the adapter is missing.")
    words, _ = made("resize", rank=4, name="small.safetensors")
    assert words[2:] == ["--output", str(root / "small.safetensors"), "--to", "auto", "--rank", "4"]
    words, _ = made("merge", base="tiny")
    assert words == ["merge", f"{source}:-0.5", "--into", "tiny", "--output", str(root / "dog-merge.safetensors")]


@pytest.mark.parametrize(
    "change",
    [
        {"adapters": [{"file": "../x.safetensors"}]},
        {"adapters": []},
        {"adapters": [{"file": "ink.safetensors"}] * 2},
        {"to": "--help"},
        {"to": "peft"},
        {"base": "/etc"},
        {"base": "--device"},
        {"kind": "merge"},
        {"kind": "extract"},
        {"rank": 0},
    ],
)
def test_other_files_and_options_are_refused(real: Settings, change: dict[str, Any]) -> None:
    request = {"kind": "convert", "adapters": [{"file": "ink.safetensors"}], **change}
    assert client_of(real).post("/api/adapters", json=request).status_code in (400, 404, 422)


def test_a_run_is_judged_and_its_report_runs_nothing(settings: Settings, client: TestClient, wait_for: Wait) -> None:
    run = settings.root / "dog"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("steps: 3\n")
    assert client.post("/api/runs/dog/evaluate", json={}).status_code == 400  # it has no adapter
    (run / "adapter.safetensors").write_bytes(b"")
    assert client.post("/api/runs/dog/evaluate", json={"strengths": [0.5, 99]}).status_code == 422
    job = client.post("/api/runs/dog/evaluate", json={"strengths": [0.5, 1], "seeds": 2}).json()
    assert job["words"][:4] == ["evaluate", str(run), "--strengths", "0.5,1"]
    assert Path(job["words"][7]) == run / "evaluation"
    wait_for(lambda: client.get("/api/runs/dog").json()["summary"]["state"] == "finished")
    assert client.get("/runs/dog/evaluation").status_code == 404
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "evaluation.html").write_text("<script>alert(1)</script>")
    answer = client.get("/runs/dog/evaluation")
    policy = answer.headers["content-security-policy"]
    assert "sandbox" in policy
    assert "default-src 'none'" in policy
    assert "script" not in policy
    assert "/runs/dog/evaluation" in client.get("/runs/dog").text
