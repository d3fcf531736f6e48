"""The command line as people use it, and its answers to mistakes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.registry import methods as known_methods
from diffgraft.bases import load_base
from diffgraft.cli.console import key_values, parse_strengths, width_height
from diffgraft.cli.main import main
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.planning.plan import Plan
from diffgraft.trainers.run.folder import Run
from tests.recipes import SUBJECT


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["diffgraft", *map(str, words)])
    monkeypatch.setattr("warnings.showwarning", None)
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_train_then_generate(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, drawn = tmp_path / "run", tmp_path / "drawn"
    words = ["train", SUBJECT, f"images={pictures}", "subject=dog", "steps=2", "prior.images=2", f"output={run}"]
    assert call(monkeypatch, *words, "sample_prompts=a dog") == 0
    said = capsys.readouterr().out
    assert str(run / "adapter.safetensors") in said
    assert str(run / "before-after.png") in said
    assert "Trained 2 steps" in said
    assert call(monkeypatch, "train", "--resume", run) == 0
    assert "finished already, after 2 steps" in capsys.readouterr().out
    adapter = f"{run / 'adapter.safetensors'}:0.8"
    words = ["generate", "a sks dog in the snow", "--adapter", adapter, "-n", 2, "--seed", 1, "--steps", 2]
    assert call(monkeypatch, *words, "--size", "48x64", "--negative", "a cat", "--sampler", "euler", "-o", drawn) == 0
    names = [f"a-sks-dog-in-the-snow-{end}.png" for end in ("grid", "run-0.8-1", "run-0.8-2")]
    assert sorted(file.name for file in drawn.iterdir()) == names
    with Image.open(drawn / names[1]) as image:
        assert image.size == (48, 64)
    assert call(monkeypatch, "inspect", run / "adapter.safetensors") == 0
    assert "trigger  sks" in capsys.readouterr().out

    words = ["generate", "a sks dog", "-a", f"{run / 'adapter.safetensors'}:unet=0.8,text_encoder=0.5", "--steps", 4]
    more = ["--image", drawn / names[1], "--denoise", 0.5, "-o", tmp_path / "changed"]
    assert call(monkeypatch, *words, *more) == 0
    with Image.open(tmp_path / "changed" / "a-sks-dog-0.png") as image:
        assert image.size == (56, 72)  # its shape, at the base's number of pixels
    assert call(monkeypatch, "merge", adapter, "-o", tmp_path / "checkpoint") == 0
    assert (tmp_path / "checkpoint" / "model_index.json").is_file()
    assert load_base(tmp_path / "checkpoint", None).unet.dtype == torch.float16  # as the base's own files


def test_every_option_of_generate_reaches_what_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = {
        **{"base": "my/base", "count": 3, "seed": 7, "size": (96, 64), "steps": 5, "guidance": 3.5, "negative": "snow"},
        **{"sampler": "heun", "schedule": "karras", "scheduler": "euler", "noise": "gpu", "rescale": 0.5, "mimic": 4.0},
        **{"percentile": 0.9, "variation_seed": 5, "variation_strength": 0.2, "library": Path("lib")},
        **{"noise_seed_delta": 9},
        **{"wildcards": Path("words"), "style": "comfyui", "emphasis": "no-norm", "clip_skip": 2, "hires": 2.0},
        **{"hires_denoise": 0.6, "hires_steps": 9, "upscaler": "lanczos"},
        **{"image": Path("a.png"), "denoise": 0.4, "mask": Path("b.png"), "tiling": True},
        **{"precision": "bfloat16", "device": "cuda:1", "offload": "model"},
        **{"prediction_type": "v_prediction", "zero_snr": True, "quantize": "int8"},
    }
    given: dict[str, object] = {}

    def draw(prompt: str, adapters: object, **options: object) -> list[Image.Image]:
        given.update(options, prompt=prompt, adapters=adapters)
        return [Image.new("RGB", (96, 64))] * 3

    monkeypatch.setattr("diffgraft.draw.generate", draw)
    words = ["a dog", "-a", "x.safetensors:0.5", "-n", 3, "--tiling", "--zero-snr", "-o", tmp_path / "drawn"]
    for name, value in wanted.items():
        if name not in ("count", "tiling", "zero_snr"):
            words += [f"--{name.replace('_', '-')}", "96x64" if name == "size" else value]
    assert call(monkeypatch, "generate", *words) == 0
    assert {name: given.get(name) for name in wanted} == wanted
    assert (given["prompt"], given["adapters"]) == (["a dog"], {"x.safetensors": 0.5})


def test_a_quantised_base_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same scene, and not the same pixels."""
    pixels = {}
    for kind in ("none", "nf4"):
        words = ["generate", "a dog", "--steps", 4, "--quantize", kind, "-o", tmp_path / kind]
        assert call(monkeypatch, *words) == 0
        with Image.open(tmp_path / kind / "a-dog-0.png") as image:
            pixels[kind] = torch.tensor(list(image.convert("L").tobytes())).float()
    assert 0.5 < (pixels["nf4"] - pixels["none"]).abs().mean() < 0.5 * pixels["none"].std()


def test_it_says_its_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert re.fullmatch(r"diffgraft \d+\.\d+.*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["train"], "Name a recipe"),
        (["train", "subjcet"], "did you mean 'subject'"),
        (["train", SUBJECT, "subject=dog", "imags=x"], "did you mean 'images'"),
        (["train", SUBJECT, "steps"], "is not a setting: write key=value"),
        (["train", SUBJECT, "subject=dog", "images=/none"], "does not exist"),
        (["train", "--resume", "/none"], "no run to resume"),
        (["train", SUBJECT, "resume=x"], "--resume x"),
        (["train", SUBJECT, "--allow-changes"], "add --resume"),
        (["generate", "x", "--size", "60x64"], "Use 64x64"),
        (["generate", "x", "--quantize", "nf8"], "did you mean 'nf4'"),
        (["generate", "x", "--mask", "m.png"], "image is missing: give image as well"),
        (["generate", "x", "--image", "/none.png"], "The picture /none.png does not exist"),
        (["generate", "x", "-a", "/none.safetensors:text=0.5"], "/none.safetensors"),
        (["generate", "x", "--size", "²x64"], "write WIDTHxHEIGHT"),
        (["generate", "x", "--steps", "5000"], "must be 1 to 1000"),
        (["generate", "x", "-o", "/dev/null/x"], "A file or folder cannot be used"),
        (["generate", "x", "-a", "file.safetensors:much"], "is not a number"),
        (["generate", "x", "-a", "none.safetensors"], "there is no file none.safetensors"),
        (["generate", "x", "--base", "no/such"], "The base 'no/such' was not found"),
        (["generate", "x", "--size", "big"], "write WIDTHxHEIGHT"),
        (["generate", "x", "--sampler", "eular"], "did you mean 'euler'"),
        (["inspect", "none.safetensors"], "there is no file"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(
    words: list[str], answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *words) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") or "\nerror: " in said
    assert answer in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "Use a smaller"),
        (KeyboardInterrupt(), "Interrupted before anything was written"),
        (KeyboardInterrupt(Path("runs/dog")), "train --resume runs/dog"),
    ],
)
def test_what_stops_a_run_is_said(
    error: BaseException, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    for name in ("run.train.train", "planning.plan.plan_run"):
        with monkeypatch.context() as patched:
            patched.setattr("diffgraft.trainers.planning.plan.plan_run", lambda *_: Plan([("pictures", "5")], []))
            patched.setattr(f"diffgraft.trainers.{name}", stop)
            assert call(monkeypatch, "train", SUBJECT, "subject=dog") == 1
    assert answer in capsys.readouterr().err


def test_inspect_reads_headers_of_any_kind(
    short_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = Adapter(short_run.adapter.deltas, {"method": "lora", "base": "some model"})
    adapter.save(tmp_path / "odd.safetensors")
    assert call(monkeypatch, "inspect", tmp_path / "odd.safetensors") == 0
    assert "base     –" in capsys.readouterr().out
    word = Adapter({}, {}, tokens={"<zorp>": {"text_encoder": torch.ones(2, 64)}})
    word.save(tmp_path / "word.safetensors")
    assert call(monkeypatch, "inspect", tmp_path / "word.safetensors") == 0
    assert "word     <zorp>: 2 × 64 in text_encoder" in capsys.readouterr().out


def test_lists(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "methods") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == sorted(known_methods())
    assert call(monkeypatch, "methods", "lora") == 0
    said = capsys.readouterr().out
    assert "layers=attention" in said
    assert "options.dora=False\n    Learn the norm" in said
    assert call(monkeypatch, "methods", "lorra") == 1
    assert "did you mean 'lora'" in capsys.readouterr().err
    assert call(monkeypatch, "recipes") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"concept", "style", "subject", "sd15-subject", "sdxl-concept"} <= set(names)
    assert call(monkeypatch, "methods", "full") == 0
    said = capsys.readouterr().out
    assert "without rank, alpha: every weight trains" in said
    assert "layers=" not in said
    assert call(monkeypatch, "methods", "pivotal") == 0
    assert "layers=attention\n" in capsys.readouterr().out


def test_as_a_module(short_run: Run) -> None:
    command = [sys.executable, "-m", "diffgraft", "inspect", str(short_run.adapter_file)]
    assert "rank     8" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_words_are_taken_apart() -> None:
    assert key_values(["a=b=c", "prior.weight=1"]) == {"a": "b=c", "prior.weight": "1"}
    assert parse_strengths(["a.safetensors", "b.safetensors:0.5", "c:d/e.safetensors", "f:-1"]) == {
        "a.safetensors": 1.0,
        "b.safetensors": 0.5,
        "c:d/e.safetensors": 1.0,
        "f": -1.0,
    }
    assert parse_strengths(["a.safetensors:unet=0.5,text_encoder=-1"]) == {
        "a.safetensors": {"unet": 0.5, "text_encoder": -1.0}
    }
    assert parse_strengths(["a.safetensors:0.5", "a.safetensors"]) == {"a.safetensors": 1.5}
    with pytest.raises(DiffgraftError, match="is given twice"):
        parse_strengths(["a.safetensors:unet=0.5", "a.safetensors"])
    assert width_height("96x64") == (96, 64)
    assert width_height("96") == (96, 96)
    assert width_height("") is None
    for word in ("nan", "inf", ""):
        with pytest.raises(DiffgraftError, match="is not a number"):
            parse_strengths([f"a.safetensors:{word}"])


@pytest.mark.parametrize("given", ["20.5", "-100", "1e38", "unet=21", "1,0,0,0,0,0,0,0,0,0,0,30"])
def test_strengths_that_give_noise_are_refused(given: str) -> None:
    with pytest.raises(DiffgraftError, match="beyond ±20: 1 is the adapter as trained"):
        parse_strengths([f"a.safetensors:{given}"])
    assert parse_strengths(["a.safetensors:-20"]) == {"a.safetensors": -20.0}


def test_a_configuration_of_another_tool_becomes_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "dog.toml"
    config.write_text('network_module = "networks.lora"\nnetwork_dim = 6\ntrain_data_dir = "img"\nclip_skip = 2\n')
    assert call(monkeypatch, "import-config", config) == 0
    said = capsys.readouterr().out
    assert "network_dim = 6 → rank: 6" in said
    assert "clip_skip = 2: the text encoder's last layer" in said
    assert "diffgraft train dog.yaml" in said
    text = (tmp_path / "dog.yaml").read_text("utf-8")
    assert text.startswith("# diffgraft train dog.yaml\n# made of dog.toml of sd-scripts\n")
    assert "rank: 6" in text
    assert call(monkeypatch, "import-config", config) == 1
    assert "dog.yaml exists already" in capsys.readouterr().err
    assert call(monkeypatch, "import-config", config, "-o", "new.yaml") == 0
    assert (tmp_path / "new.yaml").read_text("utf-8").splitlines()[2:] == text.splitlines()[2:]
