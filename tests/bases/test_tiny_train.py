"""The rebuilding of the embedded base: every stage in small, its loop stopped and started, its optimiser."""

import errno
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTokenizer

from diffgraft.bases import load_base
from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.train import __main__ as train_main
from diffgraft.bases.tiny.train import pool as pool_module
from diffgraft.bases.tiny.train.__main__ import main
from diffgraft.bases.tiny.train.fit import fit, train_stage
from diffgraft.bases.tiny.train.muon import MuonAndAdamW
from diffgraft.bases.tiny.train.pool import draw_pool
from diffgraft.bases.tiny.train.samples import END, captions_of, pad_ids, rare_words, sample_at, tokens
from diffgraft.bases.tiny.train.text import ANSWERS, labels_of_caption
from diffgraft.bases.tiny.train.unet import timesteps
from tests.bases.shared_steps import PLAN, SmallStage, small_model


def loss_of(model: nn.Module, stop: int = 99) -> object:
    def loss(step: int) -> Tensor:
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(5, 3, 7, 9, generator=torch.Generator().manual_seed(step))
        total: Tensor = (model(x) - x.mean()).square().mean()
        return total

    return loss


@pytest.mark.parametrize("muon", [False, True])
def test_a_stage_that_is_stopped_goes_on_to_the_same_weights(tmp_path: Path, muon: bool) -> None:
    plan = replace(PLAN, muon=muon)
    whole = small_model()
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    fit("whole", whole, loss_of(whole), plan, tmp_path)  # type: ignore[arg-type]
    assert all(not torch.equal(before[name], p) for name, p in whole.named_parameters())

    halves = small_model()
    with pytest.raises(KeyboardInterrupt):
        fit("halves", halves, loss_of(halves, stop=7), plan, tmp_path)  # type: ignore[arg-type]
    halves = small_model()
    fit("halves", halves, loss_of(halves), plan, tmp_path)  # type: ignore[arg-type]
    for (name, one), other in zip(whole.named_parameters(), halves.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


@pytest.mark.parametrize("muon", [False, True])
def test_processes_that_share_steps_train_what_one_does(tmp_path: Path, muon: bool) -> None:
    plan = replace(PLAN, muon=muon)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = train_stage(SmallStage(), plan, tmp_path / "one")
    together = train_stage(SmallStage(), plan, tmp_path / "two", processes=2)
    for (name, one), other in zip(alone.named_parameters(), together.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), name
        assert (one - small_model().get_parameter(name)).abs().max() > 1e-3


def test_muon_steps_along_the_orthogonal_part_of_the_gradient() -> None:
    """Against the singular value decomposition in float64: all singular values near one, the same subspaces."""
    layer = nn.Conv2d(5, 8, (2, 3), bias=False)
    weight = layer.weight.detach().clone()
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    optimizer = MuonAndAdamW(nn.ModuleDict({"inner": layer, "norm": nn.LayerNorm(3)}), lr=0.01)
    layer.weight.grad = gradient.clone()
    optimizer.step()
    moved = (layer.weight.detach() - weight * (1 - 0.01 * 0.01)).flatten(1).double().numpy()
    u, _, v = np.linalg.svd(gradient.flatten(1).double().numpy(), full_matrices=False)
    wanted = -0.01 * 0.2 * np.sqrt(30) * (u @ v)
    cosine = (moved * wanted).sum() / np.linalg.norm(moved) / np.linalg.norm(wanted)
    assert cosine > 0.97
    assert abs(np.linalg.norm(moved) / np.linalg.norm(wanted) - 1) < 0.2


def test_half_of_the_timesteps_lie_where_outlines_form() -> None:
    times = timesteps(np.random.default_rng(0), 20_000)
    assert times.min() >= 0
    assert times.max() <= 999
    share = ((times >= 470) & (times < 730)).mean()
    assert abs(share - (0.5 * 0.26 + 0.5 * 0.683)) < 0.02


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Work folder of a dry run of two processes, and the base in it."""
    work = tmp_path_factory.mktemp("work")
    main(["--work", str(work), "--dry-run", "--processes", "2"])
    return work, work / f"dry-{TINY.name}"


def test_a_dry_run_writes_a_base_that_draws(dry_run: tuple[Path, Path], tmp_path: Path) -> None:
    """Not over the base that ships; once more, the stages are read back, whatever the number of processes."""
    work, folder = dry_run
    base = load_base(folder)
    images = base.pipeline()("a zorb toy", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert images[0].size == (64, 64)
    main(["--work", str(work), "--output", str(tmp_path / "base"), "--dry-run"])
    file = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "base" / file).read_bytes() == (folder / file).read_bytes() != (TINY / file).read_bytes()


def test_a_pool_that_is_stopped_goes_on_at_the_missing_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "CHUNK", 3)
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(TINY / "vae").float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    latents, ids = draw_pool(tmp_path, vae, tokenizer, 7)
    assert latents.shape == (7, 4, 16, 16)
    assert ids.shape == (7, 2, 32)
    paths = sorted((tmp_path / "pool").iterdir())
    assert len(paths) == 3
    stamps = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    again, same = draw_pool(tmp_path, vae, tokenizer, 7)
    assert torch.equal(latents, again)
    assert torch.equal(ids, same)
    assert [path.stat().st_mtime_ns for path in (paths[0], paths[2])] == [stamps[0], stamps[2]]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    loaded: CLIPTokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    return loaded


def test_stored_captions_are_what_a_pipeline_reads(tokenizer: CLIPTokenizer) -> None:
    words = rare_words(tokenizer)
    texts = [text for number in range(100) for text in captions_of(sample_at(number, words), number)]
    whole = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(pad_ids(tokens(tokenizer, texts)), whole)
    assert whole[:, 31].eq(END).all(), "a caption is longer than what is stored of it"


def test_labels_say_what_a_caption_says(tokenizer: CLIPTokenizer) -> None:
    words = rare_words(tokenizer)
    silent = 0
    for number in range(300):
        sample = sample_at(number, words)
        for text in captions_of(sample, number):
            labels = dict(zip(ANSWERS, labels_of_caption(sample, text), strict=True))
            assert ANSWERS["thing"][labels["thing"]] in text
            if labels["backdrop"]:
                assert f"{ANSWERS['backdrop'][labels['backdrop']]} background" in text
            if labels["setting"] < 0:
                silent += 1
                assert "background" not in text
            else:
                assert ANSWERS["setting"][labels["setting"]] == sample.scene.setting
    assert 0.02 < silent / 600 < 0.15


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that ends the command; there is no traceback, as it ends by `SystemExit`."""
    with pytest.raises(SystemExit) as end:
        main(words)
    return str(end.value.code) if isinstance(end.value.code, str) else capsys.readouterr().err


def test_what_is_damaged_or_of_another_training_is_refused(
    dry_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name, before anything is trained or written; pickled code does not run."""
    work, output = tmp_path / "work", tmp_path / "base"
    words = ["--work", str(work), "--output", str(output), "--dry-run"]

    def again() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(dry_run[0], work)

    for name in ("vae.pt", "unet.pt", "world-0-20.npy"):
        for content in (b"", b"hi", (dry_run[0] / name).read_bytes()[:1000], pickle.dumps(print)):
            again()
            for stage in ("vae", "judge") if name.startswith("world") else ():
                (work / f"{stage}.pt").unlink()
            (work / name).write_bytes(content)
            assert f"{work / name} is damaged" in refused(words, capsys)
    again()
    shutil.copy(work / "judge.pt", work / "vae.pt")
    assert "vae.pt was trained with other settings than these (lr: 0.002 → 0.001" in refused(words, capsys)
    again()
    assert "unet.pt was trained with other settings" in refused([*words, "--keep", "vae"], capsys)
    for option in ("--processes", "--threads", "--pool", "--steps"):
        assert f"{option}: '0' must be a whole number" in refused([*words, option, "0"], capsys)
    assert not output.exists()
    output.touch()
    assert "is a file: give the path of a folder" in refused(words, capsys)


def test_a_base_is_replaced_as_a_whole(
    dry_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If its last file cannot be written, the former base is as before; other files stay beside a new one."""
    work, before = dry_run
    output = tmp_path / "base"
    shutil.copytree(before, output)
    (output / "README.md").write_text("a card", "utf-8")

    def files() -> dict[str, bytes]:
        return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}

    whole = files()
    words = ["--work", str(work), "--output", str(output), "--dry-run"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(train_main, "write_safetensors", full)
        assert "The disk is full" in refused(words, capsys)
    assert files() == whole
    main(words)
    assert files() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
