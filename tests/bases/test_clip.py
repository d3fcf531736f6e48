"""CLIP: the loader against transformers' own preparation, wrong folders, and the tiny CLIP with its training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from diffgraft.bases.clip import TINY_CLIP, check_clip, clip_bytes, load_clip
from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.train.clip import contrastive_loss, main, merges_of, varied
from diffgraft.bases.tiny.train.samples import captions_of, rare_words, sample_at
from diffgraft.errors import DiffgraftError
from diffgraft.pixels import to_tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP that was trained for two steps."""
    path = tmp_path_factory.mktemp("clip")
    main(["--dry-run", "--work", str(path / "work"), "--output", str(path / "clip")])
    return path / "clip"


def picture(width: int, height: int) -> Image.Image:
    """A smooth picture, in which preparations that differ in a pixel's place differ little, but measurably."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / 9 + phase) * np.cos(y / 13 - phase) for phase in (0, 1, 2)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (150, 90), (70, 201)])
def test_pictures_are_prepared_as_transformers_does(folder: Path, size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil

    clip, image = load_clip(folder), picture(*size)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor(images=image, return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = clip.model.get_image_features(pixel_values=pixels)
        wanted = getattr(wanted, "pooler_output", wanted)
    found = clip.image_features(to_tensor([image]) / 2 + 0.5)
    assert found.shape == (1, clip.width)
    torch.testing.assert_close(found, wanted / wanted.norm(dim=-1, keepdim=True), atol=2e-3, rtol=0)


def test_texts_are_embedded_as_transformers_does(folder: Path) -> None:
    clip, texts = load_clip(folder), ["a dog", "in the snow, pixel art of a red car", "word " * 100]
    with torch.no_grad():
        for text, found in zip(texts, clip.text_features(texts), strict=True):
            ids = clip.tokenizer(text, return_tensors="pt", truncation=True, max_length=77).input_ids
            wanted = clip.model.get_text_features(input_ids=ids)
            wanted = getattr(wanted, "pooler_output", wanted)[0]
            torch.testing.assert_close(found, wanted / wanted.norm())


def test_gradients_flow_to_pictures_alone(folder: Path) -> None:
    clip, pictures = load_clip(folder), torch.rand(2, 3, 48, 80, requires_grad=True)
    clip.image_features(pictures)[:, 0].sum().backward()
    assert pictures.grad is not None
    assert pictures.grad.abs().sum() > 0
    assert all(value.grad is None for value in clip.model.parameters())


def test_the_hash_is_of_the_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    assert load_clip(tmp_path / "other").hash == load_clip(folder).hash
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert load_clip(tmp_path / "other").hash != load_clip(folder).hash
    assert clip_bytes(folder) == 4 * sum(value.numel() for value in load_clip(folder).model.parameters())


def test_wrong_folders_are_answered_in_sentences(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"

    def answer(change: object) -> str:
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(folder, other)
        change()  # type: ignore[operator]
        with pytest.raises(DiffgraftError) as raised:
            load_clip(other)
        return str(raised.value)

    def write_config(**values: object) -> None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (other / "config.json").write_text(json.dumps({**config, **values}), "utf-8")

    def cut_weights() -> None:
        weights = load_file(folder / "model.safetensors")
        weights.pop("text_projection.weight")
        save_file(weights, other / "model.safetensors", {"format": "pt"})

    assert "has no config.json" in answer(lambda: (other / "config.json").unlink())
    assert "expected 'clip'" in answer(lambda: write_config(model_type="bert"))
    assert "cannot be read as JSON" in answer(lambda: (other / "config.json").write_text("{"))
    assert "no weights in safetensors" in answer(lambda: (other / "model.safetensors").rename(other / "model.bin"))
    assert "has no tokenizer" in answer(lambda: (other / "vocab.json").unlink())
    assert "lacks 1 of the weights" in answer(cut_weights)
    assert "cannot be loaded as a CLIP" in answer(lambda: (other / "model.safetensors").write_bytes(b"no weights"))
    text = json.dumps({"image_mean": [1, 2]})
    assert "expected three numbers" in answer(lambda: (other / "preprocessor_config.json").write_text(text))
    for source, reason in ((tmp_path / "none" / "none", "was not found"), (folder / "config.json", "is a file")):
        with pytest.raises(DiffgraftError, match=reason):
            check_clip(source)
    with pytest.raises(DiffgraftError, match="must be a name or a path"):
        load_clip("")


def test_the_small_tokenizer_splits_captions_as_the_large_one_does() -> None:
    small, large = CLIPTokenizer.from_pretrained(TINY_CLIP), CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    assert len(small) < len(large) / 10
    words = rare_words(large)
    samples = [(sample_at(number, words), number) for number in range(400)]
    texts = [text for sample, number in samples if not sample.rare for text in captions_of(sample, number)]
    assert len(texts) > 100
    for text in texts:
        assert small.tokenize(text) == large.tokenize(text)
    assert "".join(small.tokenize("zorp")) == "zorp</w>"  # an unknown word is spelled
    assert merges_of(["aab"], [("a", "a"), ("a", "b</w>"), ("aa", "b</w>")]) == [("a", "a"), ("aa", "b</w>")]


def test_the_loss_is_smallest_for_pairs_that_agree() -> None:
    vectors, scale = torch.eye(5, 7), torch.tensor(30.0)
    assert contrastive_loss(2 * vectors, 3 * vectors, scale) < 1e-6
    assert contrastive_loss(vectors, vectors.roll(1, 0), scale) > 1


def test_variation_keeps_what_captions_tell() -> None:
    pictures = torch.rand(6, 3, 64, 64)
    first = varied(pictures, np.random.default_rng(1))
    assert first.shape == pictures.shape
    assert not torch.equal(first, varied(pictures, np.random.default_rng(2)))
    assert (first.mean((2, 3)) - pictures.mean((2, 3))).abs().max() < 0.05


def test_the_shipped_clip_is_small_and_plain() -> None:
    files = list(TINY_CLIP.iterdir())
    assert sum(file.stat().st_size for file in files) < 4 * 2**20
    assert not {file.suffix for file in files} - {".json", ".txt", ".safetensors", ".md"}
    assert isinstance(CLIPModel.from_pretrained(TINY_CLIP), CLIPModel)


def test_the_shipped_clip_tells_captions_apart() -> None:
    clip = load_clip("tiny")
    words = rare_words(CLIPTokenizer.from_pretrained(TINY / "tokenizer"))
    samples = [sample_at(50_000_000 + number, words) for number in range(64)]
    pictures = to_tensor([sample.draw() for sample in samples]) / 2 + 0.5
    texts = [sample.caption(np.random.default_rng(number)) for number, sample in enumerate(samples)]
    with torch.no_grad():
        right = (clip.image_features(pictures) @ clip.text_features(texts).T).argmax(1) == torch.arange(64)
    assert right.float().mean() > 0.6
