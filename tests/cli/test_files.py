"""Commands on adapter files, as people use them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Spec
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base, loading
from diffgraft.bases.loading import TINY
from diffgraft.trainers.run.folder import Run
from tests.adapters.test_formats import made_up
from tests.cli.test_cli import call

Say = pytest.CaptureFixture[str]


@pytest.fixture
def file(base: Base, tmp_path: Path) -> Path:
    return made_up(base).save(tmp_path / "a.safetensors")


def test_convert(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Say) -> None:
    for to in ("kohya", "webui", "lycoris", "peft", "diffusers", "diffgraft"):
        new = tmp_path / (to if to == "peft" else f"{to}.safetensors")
        assert call(monkeypatch, "convert", file, new, "--to", to) == 0
        said = capsys.readouterr().out
        assert said.startswith(str(new))
        error = float(said.split("largest relative error: ")[1].split(",")[0].split("\n")[0])
        assert error < 1e-6 if to == "diffusers" else error == 0
        assert set(load_adapter(new).modules) == set(load_adapter(file).modules)
    assert any(key.startswith("lora_te_text_model_") for key in load_file(tmp_path / "kohya.safetensors"))
    assert call(monkeypatch, "convert", file, tmp_path / "x.safetensors", "--to", "koya") == 1
    said = capsys.readouterr().err
    assert "did you mean 'kohya'" in said
    assert "approximated" not in said
    before = file.read_bytes()
    assert call(monkeypatch, "convert", file, file, "--to", "kohya") == 1
    assert "already exists" in capsys.readouterr().err
    assert call(monkeypatch, "resize", file, "-o", file, "--rank", 1) == 1
    assert "already exists" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert call(monkeypatch, "convert", file, tmp_path / "x.safetensors", "--to", "embedding") == 1
    assert "holds a single word" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_what_a_format_cannot_hold_is_approximated_on_request(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Say
) -> None:
    adapter = load_adapter(file)
    twice = type(adapter)({path: (*own, *own) for path, own in adapter.deltas.items()}, adapter.metadata)
    stacked = twice.save(tmp_path / "stacked.safetensors", "diffgraft")
    assert call(monkeypatch, "convert", stacked, tmp_path / "x.safetensors", "--to", "diffusers") == 1
    assert "Use --rank or --energy to approximate it" in capsys.readouterr().err
    assert call(monkeypatch, "convert", stacked, tmp_path / "x.safetensors", "--to", "diffusers", "--energy", 0.9) == 0
    said = capsys.readouterr().out
    assert "approximated: x.safetensors holds LoRAs" in said
    error = float(said.split("largest relative error: ")[1].split(",")[0])
    assert 0.01 < error <= 0.1**0.5


def test_combine_and_resize(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Say) -> None:
    new = tmp_path / "both.safetensors"
    assert call(monkeypatch, "combine", f"{file}:0.5", f"{file}", "-o", new) == 0  # the same file: its strengths add up
    assert "largest relative error" in capsys.readouterr().out
    one, both = load_adapter(file), load_adapter(new)
    path = one.modules[0]
    shape = (one.deltas[path][0].leaves["lora_up"].shape[0], one.deltas[path][0].leaves["lora_down"].shape[1])
    zero = torch.zeros(shape)
    torch.testing.assert_close(
        both.deltas[path][0].apply(zero, None, 1.0)[0], one.deltas[path][0].apply(zero, None, 1.5)[0]
    )
    small = tmp_path / "small.safetensors"
    assert call(monkeypatch, "resize", file, "-o", small, "--rank", 2, "--verbose") == 0
    said = capsys.readouterr().out
    assert said.count("rank    2  relative error") == len(one.modules)
    assert call(monkeypatch, "resize", file, "-o", small) == 1
    assert "--rank 8, or --energy 0.95" in capsys.readouterr().err
    assert call(monkeypatch, "diff", file, small) == 0
    said = capsys.readouterr().out
    assert f"{len(one.modules)} of {len(one.modules)} modules that both have differ" in said
    assert "rank: unset → 2" in said
    assert said.splitlines()[1].split()[:2] == ["block", "modules"]
    assert call(monkeypatch, "diff", file, file) == 0
    assert "They do the same, to the bit." in capsys.readouterr().out
    assert call(monkeypatch, "diff", file, small, "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["errors"]) == set(one.modules)


def test_extract(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Say) -> None:
    tuned, new = tmp_path / "tuned", tmp_path / "extracted.safetensors"
    assert call(monkeypatch, "merge", file, "-o", tuned, "--precision", "float32") == 0
    assert call(monkeypatch, "extract", tuned, TINY, "-o", new, "--rank", 5) == 0
    said = capsys.readouterr().out
    assert float(said.split("largest relative error: ")[1].split(",")[0]) < 1e-3
    assert set(load_adapter(new).modules) == set(load_adapter(file).modules)
    assert call(monkeypatch, "inspect", new) == 0
    said = capsys.readouterr().out
    assert "method   locon" in said
    assert "ranks    3 × " in said
    assert call(monkeypatch, "inspect", new, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["modules"]) == len(load_adapter(file).modules)
    assert call(monkeypatch, "extract", tuned, tmp_path / "none", "-o", tmp_path / "new.safetensors", "--rank", 5) == 1
    assert "The base " in capsys.readouterr().err


def test_what_full_training_leaves_goes_into_the_names_of_lycoris(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Say
) -> None:
    """Embeddings and norms of the text encoder included."""
    method = get_method("full")
    live = method.attach(base, Spec({"unet": [], "text_encoder": []}, 1, 1.0, 0, method.read_options({})))
    with torch.no_grad():
        for value in live.trainable().values():
            value += 0.01
    file = live.adapter({"method": "full"}).save(tmp_path / "full.safetensors", "diffgraft")
    live.detach()
    assert call(monkeypatch, "convert", file, tmp_path / "a.safetensors", "--to", "kohya") == 0
    assert "largest relative error: 0\n" in capsys.readouterr().out
    assert call(monkeypatch, "convert", file, tmp_path / "b.safetensors", "--to", "diffusers", "--rank", 1) == 0
    said = capsys.readouterr().out
    assert "left out, as LoRA cannot hold it" in said
    assert "in text_encoder.final_layer_norm" not in said


def test_convert_part_of_a_file_and_in_another_precision(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Say
) -> None:
    held = load_adapter(file)
    words = {word: {"text_encoder": torch.randn(2, 64)} for word in ("<s1>", "<s2>")}
    both = type(held)(held.deltas, held.metadata, tokens=words).save(tmp_path / "both.safetensors", "lycoris")
    assert call(monkeypatch, "convert", both, tmp_path / "x.safetensors", "--to", "diffusers") == 1
    assert "--only weights" in capsys.readouterr().err
    weights = tmp_path / "weights.safetensors"
    assert call(monkeypatch, "convert", both, weights, "--to", "diffusers", "--only", "weights") == 0
    assert float(capsys.readouterr().out.split("largest relative error: ")[1].split(",")[0]) < 1e-6
    assert set(load_adapter(weights).modules) == set(held.modules)
    assert call(monkeypatch, "convert", both, tmp_path / "s2.safetensors", "--only", "<s2>", "--to", "embedding") == 0
    assert list(load_file(tmp_path / "s2.safetensors")) == ["<s2>"]
    assert call(monkeypatch, "convert", both, tmp_path / "x.safetensors", "--only", "<s3>") == 1
    assert "did you mean '<s" in capsys.readouterr().err
    half = tmp_path / "half.safetensors"
    assert call(monkeypatch, "convert", both, half, "--to", "kohya", "--precision", "float16") == 0
    error = float(capsys.readouterr().out.split("largest relative error: ")[1].split(",")[0])
    assert 0 < error < 1e-2
    assert load_file(half)["bundle_emb.<s1>.string_to_param.*"].dtype == torch.float16
    assert all(value.dtype == torch.float16 for key, value in load_file(half).items() if key.endswith("up.weight"))
    assert call(monkeypatch, "convert", both, tmp_path / "x.safetensors", "--precision", "fp16") == 1
    assert "did you mean 'float16'" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_diff_as_json_is_json_where_only_one_has_a_module(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Say
) -> None:
    held = load_adapter(file)
    first, *others = held.deltas
    one = type(held)({first: held.deltas[first]}, held.metadata).save(tmp_path / "one.safetensors")
    assert call(monkeypatch, "diff", one, file, "--json") == 0
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert said["errors"][first] == 0
    assert said["errors"][others[0]] is None
    assert call(monkeypatch, "diff", one, file) == 0
    said = capsys.readouterr().out
    assert said.startswith("0 of 1 modules that both have differ\n")
    assert f"only in {file}: {len(others)} modules" in said


def test_convert_a_checkpoint(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Say) -> None:
    folder = folders / "sd1"
    monkeypatch.setattr(loading, "CONFIGS", folders)
    single = tmp_path / "one.safetensors"
    assert call(monkeypatch, "convert", folder, single) == 0
    assert call(monkeypatch, "convert", single, tmp_path / "folder") == 0
    assert load_base(tmp_path / "folder").hash == load_base(folder).hash
    assert call(monkeypatch, "convert", single, tmp_path / "x", "--to", "kohya") == 1
    assert "--to is for adapters" in capsys.readouterr().err
    assert call(monkeypatch, "inspect", single) == 1
    assert "is a whole checkpoint" in capsys.readouterr().err


def test_figures_come_after_all_that_the_header_tells(
    short_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = short_run.adapter.save(tmp_path / "own.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    start = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{start}.lora_down.weight": torch.randn(2, 6), f"{start}.lora_up.weight": torch.randn(4, 2)}
    save_file(tensors, foreign, {"ss_network_dim": "2", "ss_seed": "0", "ss_epoch": "3", "ss_output_name": "ink"})
    for path in (file, foreign, short_run.folder):
        assert call(monkeypatch, "inspect", path) == 0
        short = capsys.readouterr().out.splitlines()
        assert short[-1].endswith("--figures")
        assert call(monkeypatch, "inspect", path, "--figures") == 0
        whole = capsys.readouterr().out.splitlines()
        assert whole[: len(short) - 1] == short[:-1]
        assert any(line.startswith("norms") for line in whole)
        assert len(set(whole)) == len(whole)
        assert any(line.startswith("seed") for line in whole)


def test_a_folder_of_pefts_is_told_with_its_size(
    short_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "peft"
    assert call(monkeypatch, "convert", short_run.folder, folder, "--to", "peft") == 0
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    capsys.readouterr()
    for more in ([], ["--figures"]):
        assert call(monkeypatch, "inspect", folder, *more) == 0
        assert f"file     {size / 1000:,.0f} kB" in capsys.readouterr().out.splitlines()
