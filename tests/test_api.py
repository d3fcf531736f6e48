"""The Python face: what the commands do, as functions; and how their results look in a console."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffgraft as dg
from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.methods.aesthetic import AestheticEmbedding
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.bases import Base
from diffgraft.devices import device_of
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.run.folder import Run
from tests.conftest import SHORT
from tests.recipes import SUBJECT


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_every_public_name_is_there_and_documented() -> None:
    for name in dg.__all__:
        assert getattr(dg, name).__doc__, name
    assert {"plan", "generate", "convert", "combine", "merge", "inspect", "resize", "extract", "grid"} <= set(
        dg.__all__
    )


def test_a_run_is_given_where_a_file_is(base: Base, short_run: Run) -> None:
    assert os.fspath(short_run) == str(short_run.adapter_file)
    assert dg.load_adapter(short_run).modules == short_run.adapter.modules
    bare = dg.generate("a sks dog", base=base, steps=2, seed=5)[0]
    drawn = [
        dg.generate("a sks dog", given, base=base, steps=2, seed=5)[0]
        for given in (short_run, short_run.adapter_file, {short_run: 1.0}, short_run.adapter)
    ]
    assert all(np.array_equal(pixels(drawn[0]), pixels(one)) for one in drawn)
    assert np.abs(pixels(bare) - pixels(drawn[0])).max() > 0
    with dg.graft(base.pipeline(), short_run):
        pass


def test_several_prompts_have_the_same_seeds_each(base: Base) -> None:
    four = dg.generate(["a dog", "a cat"], base=base, count=2, seed=7, steps=2)
    assert len(four) == 4
    assert np.abs(pixels(four[3]) - pixels(dg.generate("a cat", base=base, seed=8, steps=2)[0])).max() <= 2
    sheet = dg.grid({"dogs": four[:2], "cats": four[2:]})
    assert sheet.width > 2 * four[0].width
    assert dg.grid(four).height < sheet.height


@pytest.mark.parametrize("given", [5, None, "a.png", Image.new("RGB", (8, 8)), [5], [None], {"row": 5}, [], {"a": []}])
def test_what_is_no_list_of_pictures_is_told(given: Any) -> None:
    with pytest.raises(dg.DiffgraftError, match=r"must be a|give at least one"):
        dg.grid(given)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *(("combine", one) for one in ((5,), ([],), ({},))),
        *(("extract", one) for one in ((5, 5, 4), ("none", None, 4))),
        *(("generate", one) for one in ((5,), ([5],), (None,))),
        *(("load_base", one) for one in ((5,), (None,))),
        *(("plan", one) for one in ((5,), (None,))),
        *(("train", one) for one in ((5,), (None,))),
    ],
)
def test_values_of_another_type_are_told(name: str, given: tuple[Any, ...]) -> None:
    with pytest.raises(dg.DiffgraftError, match=r"^Invalid|The base .* was not found"):
        getattr(dg, name)(*given)


@pytest.mark.parametrize("given", [Image.new("RGB", (8, 8)), np.zeros((8, 8, 3)), torch.zeros(3, 8, 8)])
def test_pictures_come_in_a_list(given: Any) -> None:
    with pytest.raises(dg.DiffgraftError, match="must be a folder, or a list of paths and PIL images"):
        dg.plan(SUBJECT, images=given, subject="dog")


def test_a_grid_takes_paths_as_well(tmp_path: Path) -> None:
    Image.new("RGB", (130, 99), (1, 2, 3)).save(tmp_path / "a.png")
    own = dg.grid([tmp_path / "a.png", str(tmp_path / "a.png")])
    assert np.array_equal(pixels(own), pixels(dg.grid([Image.new("RGB", (130, 99), (1, 2, 3))] * 2)))
    with pytest.raises(dg.DiffgraftError, match=r"The picture .* does not exist"):
        dg.grid([tmp_path / "b.png"])


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"guidance": -3.0}, "Invalid value guidance=-3: must be 0 to 100"),
        ({"guidance": float("inf")}, "Invalid value guidance=inf"),
        ({"steps": 0}, "Invalid value steps=0: must be 1 to 1000"),
        ({"sampler": "eulr"}, "did you mean 'euler'"),
        ({"schedule": "karas"}, "did you mean 'karras'"),
        ({"hires": 20.0}, "hires.scale=20: must be 1 to 8"),
        ({"upscaler": "latent"}, "upscaler=latent applies to a second pass, but hires is missing"),
        ({"clip_skip": 0}, "clip_skip=0: must be at least 1"),
        ({"scheduler": "eulr"}, "did you mean 'euler'"),
        ({"size": (64, 10**6)}, "sides must be 8 to 8192 pixels"),
        ({"denoise": 0.5}, "denoise=0.5 applies to a picture to start from, but image is missing"),
        ({"mask": "white.png"}, "mask=white.png applies to a picture to start from, but image is missing"),
        ({"image": Image.new("RGB", (64, 48)), "denoise": 1.5}, "Invalid value denoise=1.5: must be above 0"),
        ({"count": 0}, "count=0"),
        ({"device": "cuda:77"}, "Invalid value device=.cuda:77.: this machine has"),
        ({"device": "nonsense"}, "Invalid value device='nonsense': this machine has"),
        ({"device": "cpu", "offload": "model"}, "offload=model needs a GPU"),
        ({"offload": "all"}, "Invalid value offload='all'"),
        ({"precision": "fp16"}, "did you mean 'float16'"),
        ({"adapters": "none.safetensors"}, "there is no file none.safetensors"),
    ],
)
def test_what_cannot_be_drawn_is_told_before_a_base_is_loaded(settings: dict[str, Any], answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        dg.generate("a dog", base="no/such/base.safetensors", **settings)


@pytest.mark.parametrize(
    "settings",
    [{"offload": "model"}, {"device": "cpu"}, {"precision": "float16"}, {"zero_snr": False}, {"quantize": "int8"}],
)
def test_how_a_base_is_loaded_cannot_be_told_of_a_loaded_one(base: Base, settings: dict[str, Any]) -> None:
    with pytest.raises(DiffgraftError, match=f"{next(iter(settings))}=.* is an option for loading a base, but base is"):
        dg.generate("a dog", base=base, **settings)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("a dog <lora:ink:0.8>", r"There is no adapter 'ink': give the folder of adapters"),
        ("a dog <lira:ink:0.8>", r"<lira:ink:0.8>, which names an unknown kind of adapter: did you mean 'lyco'|'lora'"),
    ],
)
def test_prompts_that_name_what_is_missing_are_refused(base: Base, prompt: str, answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        dg.generate(prompt, base=base, steps=1)


def test_prompts_are_read_by_the_grammar_of_webui(base: Base) -> None:
    plain = pixels(dg.generate("a dog", base=base, steps=4)[0])
    assert np.array_equal(pixels(dg.generate("a {dog|dog}", base=base, steps=4)[0]), plain)
    assert np.abs(pixels(dg.generate("a (dog:1.5)", base=base, steps=4)[0]) - plain).mean() > 0.1


def test_the_former_names_of_samplers_are_read_with_a_warning(base: Base) -> None:
    wanted = pixels(dg.generate("a dog", base=base, steps=3, sampler="DPM++ 2M", schedule="karras")[0])
    with pytest.warns(UserWarning, match=r"scheduler=dpm\+\+-karras is now sampler='dpm\+\+ 2m', schedule='karras'"):
        found = pixels(dg.generate("a dog", base=base, steps=3, scheduler="dpm++-karras")[0])
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("tiling", [False, True])
def test_a_vae_decodes_in_tiles_only_where_asked(tiling: bool, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    decode = base.vae.decode

    def watched(latents: torch.Tensor) -> Any:
        seen.append((len(latents), base.vae.use_tiling))
        return decode(latents)

    monkeypatch.setattr(base.vae, "decode", watched)
    dg.generate("a dog", base=base, steps=1, size=(96, 64), tiling=tiling, count=2)
    assert seen == [(1, tiling)] * 2
    assert not base.vae.use_tiling


def test_precision_device_and_tiles(base: Base) -> None:
    half = dg.generate("a dog", precision="bfloat16", device="cpu", tiling=True, steps=2, size=(96, 64))[0]
    assert half.size == (96, 64)
    whole = dg.generate("a dog", base=base, steps=2, size=(96, 64))[0]
    assert 0 < np.abs(pixels(half) - pixels(whole)).mean() < 30


@pytest.mark.parametrize(
    ("device", "precision", "wanted"),
    [
        ("cuda", "", torch.float16),
        ("cuda", "float32", torch.float32),
        ("mps", "", torch.float16),
        ("cpu", "", torch.float32),
        ("cpu", "bfloat16", torch.bfloat16),
    ],
)
def test_a_gpu_draws_in_half_precision_unless_told_otherwise(
    device: str, precision: str, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []

    def load(_name: str, dtype: torch.dtype) -> Base:
        asked.append(dtype)
        raise DiffgraftError("asked")

    monkeypatch.setattr("diffgraft.draw.device_of", torch.device)
    monkeypatch.setattr("diffgraft.draw.load_base", load)
    with pytest.raises(DiffgraftError, match="asked"):
        dg.generate("a dog", precision=precision, device=device)
    assert asked == [wanted]


@pytest.mark.parametrize(
    ("offload", "done"),
    [("none", ["moved to cuda:1", "drew"]), ("model", ["offloaded to cuda:1", "drew", "without hooks"])],
)
def test_a_base_moves_to_the_gpu_as_a_whole_or_part_by_part(
    offload: str, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    pipe = SimpleNamespace(
        enable_model_cpu_offload=lambda device: calls.append(f"offloaded to {device}"),
        remove_all_hooks=lambda: calls.append("without hooks"),
    )
    base = SimpleNamespace(pipeline=lambda: pipe)
    base.to = lambda device: calls.append(f"moved to {device}") or base
    session = nullcontext(SimpleNamespace(draw=lambda *_: calls.append("drew")))
    replaced: dict[str, Any] = {"device_of": torch.device, "load_base": lambda *_: base, "Session": lambda *_: session}
    for name, value in replaced.items():
        monkeypatch.setattr(f"diffgraft.draw.{name}", value)
    dg.generate("a dog", device="cuda:1", offload=offload)
    assert calls == done


@pytest.mark.parametrize(("there", "name"), [(True, "cuda"), (False, "cpu")])
def test_the_accelerator_draws_where_there_is_one(there: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert device_of() == torch.device(name)


def test_files_go_through_every_command(base: Base, short_run: Run, tmp_path: Path) -> None:
    done = dg.convert(short_run, tmp_path / "half.safetensors", "diffusers", precision="float16")
    assert done.path.exists()
    assert next(iter(load_file(done.path).values())).dtype == torch.float16
    both = dg.combine({short_run: 0.5, done.path: 0.5}, rank=4)
    assert set(both.modules) == set(short_run.adapter.modules)
    small = dg.resize(short_run, 2)
    assert max(delta.leaves["lora_down"].shape[0] for (delta,) in small.deltas.values()) == 2
    report = dg.inspect(short_run)
    assert report.method == "lora"
    assert "ranks" in str(report)
    folder = dg.merge({short_run: 0.7}, tmp_path / "merged", base=base)
    found = dg.extract(str(folder), "tiny", 4)
    assert set(found.modules) == set(short_run.adapter.modules)
    with pytest.raises(DiffgraftError, match="rank=8, or energy="):
        dg.resize(short_run)
    with pytest.raises(DiffgraftError, match="already exists"):
        dg.merge(short_run, folder, base=base)


def test_pictures_one_by_one(base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFGRAFT_CACHE", str(tmp_path / "cache"))
    files = sorted(pictures.glob("*.png"))[:3]
    given = [files[0], str(files[1]), Image.open(files[2])]
    plan = dg.plan(SUBJECT, images=given, subject="dog")
    assert "images 3 " in " ".join(str(plan).split())
    settings = {**SHORT, "steps": 2, "sample_prompts": "a dog"}
    first = dg.train(SUBJECT, base=base, images=given, output=tmp_path / "a", **settings)
    folder = tmp_path / "folder"
    folder.mkdir()
    for place, file in enumerate(files):
        Image.open(file).save(folder / f"{place}.png")
    second = dg.train(SUBJECT, base=base, images=folder, output=tmp_path / "b", **settings)
    assert first.metrics == second.metrics
    for wrong, answer in (
        ([], "the list is empty"),
        ([5], "of type int: must be a path or a PIL image"),
        (["no.png"], "The picture no.png does not exist"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            dg.train(SUBJECT, base=base, images=wrong, subject="dog")


def test_pictures_of_a_list_keep_the_captions_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFGRAFT_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (90, 70), (1, 2, 3)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a sks dog in the snow", "utf-8")
    images = [Image.new("RGB", (60, 80)), tmp_path / "a.png"]
    assert "1 of 2 images; 2 prompts" in str(dg.plan(SUBJECT, images=images, subject="dog"))


def test_results_are_short_in_a_console(short_run: Run) -> None:
    for shown in (short_run, short_run.adapter, *short_run.adapter.deltas.values()):
        assert len(repr(shown)) < 200
    assert repr(short_run.adapter) == f"Adapter(lora: {len(short_run.adapter.modules)} modules)"
    word = Adapter({}, tokens={"<zorp>": {"text_encoder": torch.ones(1, 8)}})
    assert repr(word) == "Adapter(unknown: word '<zorp>')"
    assert repr(low_rank(torch.ones(2, 5), torch.ones(7, 2))) == "FactorDelta(lora: lora_down 2×5, lora_up 7×2)"


def test_a_network_is_short_in_a_console() -> None:
    assert repr(AestheticEmbedding({"embedding": torch.ones(1, 768)})) == "AestheticEmbedding(aesthetic: 1 tensors)"


@pytest.mark.parametrize("file", [5, None, object()])
def test_what_is_no_path_is_said(file: Any) -> None:
    with pytest.raises(DiffgraftError, match="Invalid adapter path"):
        dg.load_adapter(file)


def test_the_system_s_refusals_are_said_in_a_sentence(short_run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(DiffgraftError, match=r"A file or folder cannot be used: .*file"):
        dg.convert(short_run, tmp_path / "file" / "x.safetensors", "kohya")


class Refused(os.PathLike[str]):
    """A path that the system refuses."""

    def __fspath__(self) -> str:
        raise PermissionError(13, "Permission denied", "locked")


@pytest.mark.parametrize(
    "ask",
    [
        lambda path: dg.combine({path: 1.0}),
        lambda path: dg.convert(path, path),
        lambda path: dg.extract(path, path, 4),
        lambda path: dg.generate("a dog", path),
        lambda path: dg.grid([path]),
        lambda path: dg.inspect(path),
        lambda path: dg.load_adapter(path),
        lambda path: dg.merge(path, path),
        lambda path: dg.plan(SUBJECT, images=[path], subject="dog"),
        lambda path: dg.resize(path, 4),
        lambda path: dg.train(SUBJECT, images=[path], subject="dog"),
    ],
)
def test_what_the_system_refuses_is_told_by_every_function(ask: Callable[[Any], Any]) -> None:
    with pytest.raises(DiffgraftError, match=r"cannot be used: Permission denied \(locked\)"):
        ask(Refused())


def test_importing_it_brings_nothing_large() -> None:
    code = "import diffgraft, sys; dir(diffgraft); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
