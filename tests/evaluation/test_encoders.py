"""Encoders: their embeddings against transformers' own models and processors, with small random configurations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from diffgraft.bases.clip import TINY_CLIP
from diffgraft.errors import DiffgraftError
from diffgraft.evaluation.encoders import Encoder, Encoders, load_encoder

VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
TEXT = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
KINDS = ("clip", "vit", "dinov2", "siglip", "siglip2")


def small(kind: str) -> tuple[Any, Any]:
    """A random model of a kind, and its image processor, of sizes that differ."""
    import transformers as t

    torch.manual_seed(3)
    if kind == "clip":
        vision, text = {**VISION, "image_size": 32, "patch_size": 8}, {**TEXT, "max_position_embeddings": 9}
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=14))
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        return model, t.CLIPImageProcessorPil(**sizes)
    if kind == "vit":  # as the first DINO
        vit = t.ViTConfig(**VISION, image_size=32, patch_size=8)
        return t.ViTModel(vit, add_pooling_layer=False), t.ViTImageProcessorPil(size={"height": 32, "width": 32})
    if kind == "dinov2":
        sizes = {"size": {"shortest_edge": 36}, "crop_size": {"height": 28, "width": 28}}
        config = t.Dinov2Config(**{**VISION, "mlp_ratio": 2}, image_size=42, patch_size=7)
        return t.Dinov2Model(config), t.BitImageProcessorPil(**sizes, do_center_crop=True)
    vision = {**VISION, "patch_size": 8}
    text = {**TEXT, "max_position_embeddings": 9}
    if kind == "siglip":
        config = t.SiglipConfig(text_config=text, vision_config={**vision, "image_size": 32})
        return t.SiglipModel(config), t.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    config = t.Siglip2Config(text_config=text, vision_config={**vision, "num_patches": 16})
    return t.Siglip2Model(config), t.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp("encoders") / kind
        model, processor = small(kind)
        model.save_pretrained(found[kind])
        processor.save_pretrained(found[kind])
    return found


def picture(width: int, height: int, phase: float = 0.0) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / 9 + shift + phase) * np.cos(y / 13 - shift) for shift in (0, 1, 2)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


PICTURES = [picture(50, 34), picture(40, 71, 0.5), picture(33, 33, 1.3)]


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_transformers(kind: str, folders: dict[str, Path]) -> None:
    encoder, (model, processor) = load_encoder(str(folders[kind])), small(kind)
    found, patches = encoder.pictures(PICTURES), encoder.patches(PICTURES)
    for number, image in enumerate(PICTURES):
        inputs = processor(images=image, return_tensors="pt")
        with torch.no_grad():
            if kind in ("dinov2", "vit"):
                out = model.eval()(**inputs)
                whole, states = out.last_hidden_state[:, 0], out.last_hidden_state[:, 1:]
            else:
                out = model.eval().vision_model(**inputs)
                whole = out.pooler_output if kind != "clip" else model.visual_projection(out.pooler_output)
                states = out.last_hidden_state[:, kind == "clip" :]
        if kind == "siglip2":
            states = states[:, : int(inputs["spatial_shapes"].prod())]
        torch.testing.assert_close(found[number], F.normalize(whole[0], dim=0), atol=2e-6, rtol=0)
        torch.testing.assert_close(patches[number], F.normalize(states[0], dim=1), atol=2e-6, rtol=0)
    assert found.std(0).max() > 1e-4  # the pictures are told apart


@pytest.mark.parametrize("kind", KINDS)
def test_masks_go_through_the_same_crops_as_pictures(kind: str, folders: dict[str, Path]) -> None:
    encoder = load_encoder(str(folders[kind]))
    for size in ((60, 40), (40, 64)):
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle([0, 0, size[0] // 2 - 1, size[1]], fill=255)
        (shares,), (patches,) = encoder.coverage([mask]), encoder.patches([mask.convert("RGB")])
        assert len(shares) == len(patches)
        assert shares.mean() == pytest.approx(0.5, abs=0.03)
        side = int(len(shares) ** 0.5) if kind != "siglip2" else None
        if side is not None:
            columns = shares.view(side, side).mean(0)
            assert columns[0] > 0.95
            assert columns[-1] < 0.05


def test_texts_are_embedded_as_transformers_does() -> None:
    from transformers import CLIPModel, CLIPTokenizer

    texts = ["a dog", "a red car in the snow, pixel art", "word " * 100]
    found = load_encoder("tiny").texts(texts)
    model, tokenizer = CLIPModel.from_pretrained(TINY_CLIP).float(), CLIPTokenizer.from_pretrained(TINY_CLIP)
    longest = model.config.text_config.max_position_embeddings
    with torch.no_grad():
        for text, row in zip(texts, found, strict=True):
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=longest).input_ids
            wanted = model.get_text_features(input_ids=ids)
            torch.testing.assert_close(row, F.normalize(getattr(wanted, "pooler_output", wanted)[0], dim=0))


def test_the_clip_of_tiny_knows_its_pictures_as_the_loader_of_bases_does() -> None:
    from diffgraft.bases.clip import load_clip
    from diffgraft.pixels import to_tensor

    wanted = load_clip("tiny").image_features(to_tensor([PICTURES[0]]) / 2 + 0.5)
    torch.testing.assert_close(load_encoder("tiny").pictures(PICTURES[:1]), wanted, atol=5e-3, rtol=0)


def test_no_picture_is_embedded_twice_and_no_model_loaded_twice() -> None:
    loaded: list[str] = []
    embedded: list[int] = []

    class Counting:
        def pictures(self, images: Any) -> torch.Tensor:
            embedded.append(len(images))
            return torch.rand(len(images), 3)

    def load(source: str) -> Encoder:
        loaded.append(source)
        return Counting()  # type: ignore[return-value]

    encoders = Encoders({"clip": "one", "dino": "one", "patches": "two"}, load)
    first = encoders.pictures("clip", PICTURES[:2])
    again = encoders.pictures("dino", [*PICTURES, PICTURES[0].copy()])
    assert torch.equal(again[:2], first)
    assert torch.equal(again[3], first[0])
    encoders.pictures("patches", PICTURES[:1])
    assert (loaded, embedded) == (["one", "two"], [2, 1, 1])


def test_what_is_no_encoder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DiffgraftError, match=r"embeds pictures alone.*give a CLIP"):
        load_encoder(str(folders["dinov2"])).texts(["a dog"])
    with pytest.raises(DiffgraftError, match=r"nowhere/at-all.*--encoder"):
        load_encoder("nowhere/at-all")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', "utf-8")
    with pytest.raises(DiffgraftError, match="not a model that can embed pictures"):
        load_encoder(str(tmp_path))
