"""What `inspect` tells from a header alone is what it tells of the whole file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.ops.glance import glance
from diffgraft.adapters.ops.inspect import inspect, summary
from diffgraft.trainers.run.folder import Run
from tests.cli.test_cli import call

FACTS = ("method", "rank ", "alpha ", "trigger", "class", "seed", "base", "modules", "kinds", "ranks", "alphas", "tags")


def told(lines: list[str]) -> dict[str, str]:
    return {fact: line for fact in FACTS for line in lines if line.startswith(fact) and "–" not in line}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_of_another_tool(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {}
    for place, rank in enumerate((2, 2, 3)):
        start = f"lora_unet_down_blocks_0_attentions_{place}_proj_in"
        tensors[f"{start}.lora_down.weight"] = torch.randn(rank, 6).to(dtype)
        tensors[f"{start}.lora_up.weight"] = torch.randn(4, rank).to(dtype)
        tensors[f"{start}.alpha"] = torch.tensor(1.5).to(dtype)
    header = {
        **{"ss_network_dim": "2", "ss_network_alpha": "1.5", "ss_base_model_version": "sd_v1", "ss_seed": "7"},
        **{"ss_output_name": "ink", "ss_epoch": "3", "ss_num_epochs": "10", "ss_sd_model_name": "v1-5"},
        "ss_tag_frequency": json.dumps({"1_ink": {"dog": 3, " cat ": 5}, "2_more": {"dog": 4}}),
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, header)
    lines = glance(path)
    assert lines is not None
    whole = summary(inspect(load_adapter(path)))
    assert told(lines) == told(whole)
    assert "ranks    2 × 2, 3 × 1" in lines
    assert "alphas   1.5 × 3" in lines
    assert "tags     dog (7), cat (5)" in lines
    for line in ("output_name ink", "epoch    3", "epochs   10"):
        assert line in lines
        assert line in whole


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "lycoris"])
def test_a_file_of_our_own(short_run: Run, dialect: str, tmp_path: Path) -> None:
    path = short_run.adapter.save(tmp_path / "a.safetensors", dialect)
    lines = glance(path)
    assert lines is not None
    found, whole = told(lines), told(summary(inspect(load_adapter(path))))
    found.pop("alphas", None)
    assert found.items() <= whole.items()
    assert {"method", "trigger", "base", "modules", "kinds", "ranks"} <= set(found)


def test_settings_are_told_as_a_command_line_takes_them(tmp_path: Path) -> None:
    """In the order of the recipe, an inner key by its path."""
    recipe = {"task": "style", "lr": 1e-3, "flip": True, "loss": {"objective": "slider", "options": {"positive": "a"}}}
    recipe |= {"alpha": None, "concepts": [{"trigger": "x"}, {"trigger": "y"}], "options": {"structure": [1, 2]}}
    delta = low_rank(torch.ones(2, 6), torch.ones(4, 2))
    adapter = Adapter({"unet.mid_block.attentions.0.proj_in": (delta,)}, {"method": "lora", "recipe": recipe})
    path = adapter.save(tmp_path / "a.safetensors", "lycoris")
    lines = glance(path)
    assert lines is not None
    start = lines.index("recipe   task=style")
    assert [line.strip() for line in lines[start + 1 : start + 9]] == [
        *("lr=0.001", "flip=true", "loss.objective=slider", "loss.options.positive=a", "alpha="),
        *("concepts.0.trigger=x", "concepts.1.trigger=y", "options.structure=1,2"),
    ]
    assert set(lines[start : start + 9]) <= set(summary(inspect(load_adapter(path))))


def test_a_word(tmp_path: Path) -> None:
    word = Adapter(
        {}, {"method": "textual-inversion", "trigger": "<x>"}, tokens={"<x>": {"text_encoder": torch.ones(2, 8)}}
    )
    lines = glance(word.save(tmp_path / "x.safetensors"))
    assert lines is not None
    assert "word     <x>: 2 × 8" in lines


def test_where_the_header_does_not_suffice_the_tensors_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Adapter({"unet.mid_block.attentions.0.proj_in": (low_rank(torch.ones(2, 6), torch.ones(4, 2)),)})
    path = plain.save(tmp_path / "bare.safetensors", "lycoris")
    assert glance(path) is None
    assert call(monkeypatch, "inspect", path) == 0
    assert "norms" in capsys.readouterr().out
    for content in (b"", b"x" * 9, b"\xff" * 200, b"\x08" + b"\0" * 7 + b"[1,2,3]1", path.read_bytes()[:40]):
        (tmp_path / "bad.safetensors").write_bytes(content)
        assert glance(tmp_path / "bad.safetensors") is None
    assert glance(tmp_path) is None


@pytest.mark.parametrize("of_run", [False, True])
def test_no_torch_is_loaded(short_run: Run, of_run: bool) -> None:
    path = short_run.folder if of_run else short_run.adapter_file
    code = f"import sys; sys.argv = ['diffgraft', 'inspect', {str(path)!r}]\n"
    code += "import diffgraft.cli.main as m\ntry: m.main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "trigger  sks" in done.stdout
