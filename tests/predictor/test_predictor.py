"""Adapters predicted from pictures: what acts in training is the LoRA that is saved; files are read safely."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import diffgraft as dg
from diffgraft.bases import Base
from diffgraft.bases.layers import choose_layers
from diffgraft.errors import DiffgraftError
from diffgraft.predictor.files import read_predictor, write_predictor
from diffgraft.predictor.network import WeightPredictor
from diffgraft.predictor.predict import predict_adapter
from diffgraft.predictor.subjects import VIEWS, draw_subjects
from diffgraft.predictor.train import PredictorStage, main
from diffgraft.rng import normal


@pytest.fixture(scope="module")
def predictor(base: Base) -> WeightPredictor:
    """An untrained predictor of rank 3, whose cores are not zero."""
    paths = choose_layers("unet", base.unet, "all", base.family)
    torch.manual_seed(3)
    model = WeightPredictor({path: tuple(base.unet.get_submodule(path).weight.shape) for path in paths}, rank=3)
    nn.init.normal_(model.head.weight, std=0.1)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def file(predictor: WeightPredictor, base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_predictor(tmp_path_factory.mktemp("predictor") / "p.safetensors", predictor, base)


@torch.no_grad()
def test_what_acts_in_training_is_the_lora_that_is_saved(base: Base, predictor: WeightPredictor) -> None:
    """Two samples in one batch, each with a LoRA of its own, on linear layers and on convolutions with stride."""
    cores = predictor(normal((2, 3, 3, 64, 64), 1))
    noisy, times, prompts = normal((2, 4, 16, 16), 2), torch.tensor([300, 700]), ["a dog", "a cat"]
    bare = base.denoise(noisy, times, base.condition(prompts))
    with predictor.acting(base.unet, cores):
        both = base.denoise(noisy, times, base.condition(prompts))
    for row, prompt in enumerate(prompts):
        adapter = predictor.adapter(cores[row], "unet", {})
        own = slice(row, row + 1)
        with dg.graft(base, {adapter: 1.0}):
            one = base.denoise(noisy[own], times[own], base.condition([prompt]))
        torch.testing.assert_close(both[own], one, rtol=1e-4, atol=1e-4)
        assert (one - bare[own]).abs().max() > 0.1
    assert torch.equal(base.denoise(noisy, times, base.condition(prompts)), bare)


@torch.no_grad()
def test_the_order_of_pictures_has_no_effect_and_their_content_has(predictor: WeightPredictor) -> None:
    pictures = normal((1, 3, 3, 64, 64), 1)
    cores = predictor(pictures)
    assert cores.shape == (1, len(predictor.layers), 3, 3)
    torch.testing.assert_close(predictor(pictures[:, [2, 0, 1]]), cores, rtol=1e-4, atol=1e-5)
    assert (predictor(pictures[:, :2]) - cores).abs().max() > 1e-3


def test_a_new_predictor_changes_nothing_and_learns(base: Base, tmp_path: Path) -> None:
    """Its first LoRA is zero; the gradient of the cores is not."""
    stage = PredictorStage(base, draw_subjects(tmp_path, base.vae, base.tokenizer, 2))
    processors = base.unet.attn_processors
    try:
        model = stage.new_model()
        assert not model(torch.zeros(1, 1, 3, 64, 64)).any()
        stage.loss(model, 2, (0, 0)).backward()  # type: ignore[no-untyped-call]
    finally:
        base.unet.set_attn_processor(processors)
    gradient = model.head.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    assert all(value.grad is None for value in base.unet.parameters())


def test_subjects_look_the_same_in_all_their_pictures(base: Base, tmp_path: Path) -> None:
    held = draw_subjects(tmp_path, base.vae, base.tokenizer, 3)
    assert held.pictures.shape == (3, VIEWS, 64, 64, 3)
    assert held.latents.shape == (3, VIEWS, 4, 16, 16)
    assert held.masks.shape == (3, VIEWS, 16, 16)
    assert (held.masks.float().mean((2, 3)) > 10).all()
    different = (held.ids != held.class_ids).any(-1)
    assert different.all(), "a caption does not tell the subject from its class"
    again = draw_subjects(tmp_path, base.vae, base.tokenizer, 3)
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(held).items())


def test_a_file_predicts_as_the_network_does(
    base: Base, predictor: WeightPredictor, file: Path, pictures: Path, tmp_path: Path
) -> None:
    adapter = predict_adapter(pictures, base, file)
    adapter.save(tmp_path / "a.safetensors", "kohya")
    again = dg.load_adapter(tmp_path / "a.safetensors")
    assert len(again.modules) == len(predictor.layers)
    assert again.metadata["rank"] == 3
    wide = [Image.new("RGB", (90, 70), (200, 30, 60))]
    one, same = (predict_adapter(images, base, file) for images in (wide, wide))
    path = adapter.modules[0]
    (first,), (second,) = one.deltas[path], same.deltas[path]
    assert torch.equal(first.leaves["lora_up"], second.leaves["lora_up"])
    assert not torch.equal(first.leaves["lora_up"], adapter.deltas[path][0].leaves["lora_up"])


def test_files_that_do_not_fit_are_refused(base: Base, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2, 3)}, other)
    with pytest.raises(DiffgraftError, match="is not a predictor of weights"):
        read_predictor(other, base)
    tensors = load_file(file)
    with safe_open(file, framework="pt") as held:
        header = held.metadata()
    save_file({name: value for name, value in tensors.items() if name != "queries"}, other, header)
    with pytest.raises(DiffgraftError, match="is damaged"):
        read_predictor(other, base)
    save_file(tensors, other, {key: value.replace(str(base.hash), "0" * 64) for key, value in header.items()})
    with pytest.raises(DiffgraftError, match="another base"):
        read_predictor(other, base)
    with pytest.raises(DiffgraftError, match="no pictures"):
        predict_adapter([], base, file)


def test_a_dry_run_is_read_back(base: Base, tmp_path: Path) -> None:
    words = ["--work", str(tmp_path), "--output", str(tmp_path / "p.safetensors"), "--dry-run"]
    main(words)
    before = (tmp_path / "p.safetensors").read_bytes()
    main(words)
    assert (tmp_path / "p.safetensors").read_bytes() == before
    read_predictor(tmp_path / "p.safetensors", base)
