"""Captions and masks by models of transformers: small random ones, through the very commands."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffgraft.bases.loading import TINY
from diffgraft.cli.main import main
from diffgraft.data.captioner import Captioner
from diffgraft.data.image_folder import read_folder
from diffgraft.data.masker import mask_files, open_masker
from diffgraft.errors import DiffgraftError
from tests.trainers.forks import command_line, in_two

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = [*_SPECIAL, "a", "dog", "cat", "in", "the", "snow", "of", "photo", "on", "grass", "[DEC]"]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
VISION: dict[str, Any] = {"hidden_size": 24, "image_size": 32, "patch_size": 8, **SIZES}
SQUARE = {"height": 32, "width": 32}


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["diffgraft", *map(str, words)])
    monkeypatch.setattr("warnings.showwarning", None)
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures of unequal shapes, one of them turned on its side by a note in it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(4)
    for name, size in (("one.png", (50, 34)), ("two.jpg", (28, 45)), ("three.webp", (40, 61))):
        image = Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "two.jpg" else 1
        image.save(folder / name, exif=exif)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLIP, GIT, LLaVA and CLIPSeg, a SegFormer with labels, and two that cannot be used."""
    import transformers as t

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(12)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", "utf-8")
    words = t.BertTokenizer(str(folder / "vocab.txt"))
    text = {"vocab_size": len(WORDS), "hidden_size": 16, "max_position_embeddings": 64, **SIZES}
    ends = {"bos_token_id": len(WORDS) - 1, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    of_blip = {**text, "encoder_hidden_size": 24, "projection_dim": 8, **ends}
    blip = t.BlipConfig(text_config=of_blip, vision_config=VISION, projection_dim=8, image_text_hidden_size=8)
    _save(
        folder / "blip", t.BlipForConditionalGeneration(blip), t.BlipProcessor(t.BlipImageProcessor(size=SQUARE), words)
    )
    git = t.GitConfig(vision_config=VISION, **text, bos_token_id=2, eos_token_id=3)
    sized = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    _save(folder / "git", t.GitForCausalLM(git), t.GitProcessor(sized, words))
    clip_words = t.CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    of_clip = {**text, "vocab_size": len(clip_words), "max_position_embeddings": 77, "eos_token_id": 49407}
    both = {"text_config": of_clip, "vision_config": VISION, "projection_dim": 12}
    seg = t.CLIPSegConfig(
        **both, reduce_dim=8, extract_layers=[0, 1], decoder_num_attention_heads=2, decoder_intermediate_size=16
    )
    processor = t.CLIPSegProcessor(t.ViTImageProcessor(size=SQUARE), clip_words)
    _save(folder / "clipseg", t.CLIPSegForImageSegmentation(seg), processor)
    _save(folder / "clip", t.CLIPModel(t.CLIPConfig(**both)), t.CLIPProcessor(sized, clip_words))
    labels = {0: "sky", 1: "dog", 2: "grass, lawn"}
    former = t.SegformerConfig(
        **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]},
        **{"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
        **{"decoder_hidden_size": 16, "id2label": labels, "label2id": {name: row for row, name in labels.items()}},
    )
    _save(folder / "segformer", t.SegformerForSemanticSegmentation(former), t.SegformerImageProcessor(size=SQUARE))
    _save(folder / "llava", *_talker(t, folder))
    language = t.GPT2Config(
        **{"vocab_size": len(WORDS), "n_embd": 16, "n_layer": 2, "n_head": 4, "add_cross_attention": True},
        **{"bos_token_id": 2, "eos_token_id": 3},
    )
    joined = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(t.ViTConfig(**VISION), language)
    _save(folder / "joined", t.VisionEncoderDecoderModel(joined), t.BertTokenizer(str(folder / "vocab.txt")))
    t.ViTImageProcessor(size=SQUARE).save_pretrained(folder / "joined")
    return folder


def _talker(t: Any, folder: Path) -> tuple[Any, Any]:
    """A LLaVA, which is asked in a chat."""
    (folder / "chat.txt").write_text("\n".join([*WORDS, "<image>", "describe", "picture"]) + "\n", "utf-8")
    words = t.BertTokenizer(str(folder / "chat.txt"), extra_special_tokens={"image_token": "<image>"})
    image = words.convert_tokens_to_ids("<image>")
    language = {"vocab_size": len(WORDS) + 3, "hidden_size": 16, "num_key_value_heads": 2, **SIZES}
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**language, bos_token_id=2, eos_token_id=3, pad_token_id=0),
        image_token_index=image,
        vision_feature_layer=-1,
    )
    part = "{% if one.type == 'image' %}<image> {% else %}{{ one.text }}{% endif %}"
    processor = t.LlavaProcessor(
        t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=f"{{% for one in messages[0].content %}}{part}{{% endfor %}}",
    )
    return t.LlavaForConditionalGeneration(config), processor


def _save(folder: Path, model: Any, processor: Any) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["blip", "git", "llava"])
def test_every_picture_gets_a_caption(
    kind: str, photos: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "two.txt").write_text("mine", "utf-8")
    words = ["caption", photos, "--model", models / kind, "--prefix", "ein Größe,", "--max-tokens", 5]
    assert call(monkeypatch, *words) == 0
    assert "2 captions written, 1 existing kept" in capsys.readouterr().out
    assert (photos / "two.txt").read_text("utf-8") == "mine"
    captions = [caption for picture in read_folder(photos) if (caption := picture.caption) and caption != "mine"]
    assert len(captions) == 2
    assert all(caption.startswith("ein Größe,") for caption in captions)
    assert not any(special in caption for caption in captions for special in ("[CLS]", "[SEP]", "<image>", "Describe"))
    before = (photos / "one.txt").read_bytes()
    assert call(monkeypatch, *words, "--overwrite") == 0
    assert "3 captions written" in capsys.readouterr().out
    assert (photos / "one.txt").read_bytes() == before  # nothing about it is random
    assert (photos / "two.txt").read_text("utf-8") != "mine"
    assert sorted(path.suffix for path in photos.iterdir()) == [".jpg", ".png", *[".txt"] * 3, ".webp"]


@pytest.mark.parametrize("kind", ["blip", "git"])
def test_captions_are_those_of_the_model_itself(kind: str, photos: Path, models: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = (made.from_pretrained(models / kind) for made in (AutoModelForImageTextToText, AutoProcessor))
    image = read_folder(photos)[0].image
    ids = model.generate(**processor(images=image, return_tensors="pt"), max_new_tokens=7, do_sample=False)
    expected = " ".join(processor.decode(ids[0], skip_special_tokens=True).split())
    assert Captioner(str(models / kind), max_tokens=7)(image) == expected


def test_the_beginning_of_a_caption_is_part_of_it(photos: Path, models: Path) -> None:
    image = read_folder(photos)[0].image
    assert "a photo of" in Captioner(str(models / "blip"), "a photo of", 4)(image)
    assert "photo of the grass" not in Captioner(str(models / "git"), "photo of the grass", 4)(image)  # a question


def test_every_picture_gets_a_mask(
    photos: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["mask", photos, "--prompt", "the dog", "--model", models / "clipseg", "--threshold", 0.01]
    assert call(monkeypatch, *words) == 0
    assert "3 masks written" in capsys.readouterr().out
    pictures = read_folder(photos)
    assert len(pictures) == 3  # masks are none
    for picture in pictures:
        assert picture.mask_file is not None
        with Image.open(picture.mask_file) as mask:
            assert (mask.mode, mask.size) == ("L", picture.image.size)
    assert call(monkeypatch, *words) == 0
    assert "0 masks written, 3 existing kept" in capsys.readouterr().out


def test_masks_are_those_of_the_model_itself(photos: Path, models: Path) -> None:
    """CLIPSeg's own figures, enlarged by another hand; and one pixel more on each side."""
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    model, processor = (
        kind.from_pretrained(models / "clipseg") for kind in (CLIPSegForImageSegmentation, CLIPSegProcessor)
    )
    image = read_folder(photos)[0].image
    with torch.no_grad():
        logits = model(**processor(text=["the dog"], images=[image], return_tensors="pt")).logits.view(32, 32)
    large = np.asarray(Image.fromarray(logits.numpy()).resize(image.size, Image.Resampling.BILINEAR))
    middle = float(np.median(large))
    found = np.asarray(open_masker("the dog", str(models / "clipseg"), 1 / (1 + np.exp(-middle)))(image)) > 0
    assert found.shape == large.shape
    assert 0.3 < found.mean() < 0.7
    assert (found == (large > middle)).mean() > 0.97  # the two enlarge alike but for rounding at edges


def test_models_with_labels_find_what_the_prompt_names(photos: Path, models: Path) -> None:
    from transformers import pipeline

    image = read_folder(photos)[0].image
    parts = pipeline("image-segmentation", model=str(models / "segformer"))(image)
    seen = {part["label"]: np.asarray(part["mask"]) > 0 for part in parts}
    assert seen
    for label, mask in seen.items():
        word = label.split(",")[-1].strip()
        found = np.asarray(open_masker(f"the {word}", str(models / "segformer"))(image)) > 0
        assert (found == mask).all()
    with pytest.raises(DiffgraftError, match="no label for 'the dogs'"):
        open_masker("the dogs", str(models / "segformer"))


def test_where_nothing_is_found_no_mask_is_written(photos: Path, models: Path) -> None:
    masker = open_masker("the dog", str(models / "clipseg"), 1.0)
    with pytest.warns(UserWarning, match="gets no mask: nothing was found"):
        assert mask_files(photos, masker) == ([], 0)
    assert not list(photos.glob("*_mask.png"))


def test_masks_grow(photos: Path) -> None:
    def dot(image: Image.Image) -> Image.Image:
        mask = Image.new("L", image.size)
        mask.putpixel((9, 5), 255)
        return mask

    written, _ = mask_files(photos, dot, grow=2)
    for path in written:
        with Image.open(path) as mask:
            assert mask.getbbox() == (7, 3, 12, 8)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["caption", "{photos}", "--model", "no/such"], "The model 'no/such' was not found"),
        (
            ["caption", "{photos}", "--model", "{models}/clip"],
            "not a model that can caption pictures: it is of the kind",
        ),
        (["caption", "{photos}", "--model", "{models}/clipseg"], "'clipseg'"),
        (["caption", "{photos}", "--model", "{models}/half"], "its file lacks"),
        (["caption", "{photos}", "--model", "{models}/pickled"], "no weights in safetensors"),
        (["caption", "{photos}", "--model", "{models}/coded"], "not a model that can caption pictures"),
        (["caption", "{photos}", "--model", "{models}/joined"], "need inputs that are not supported here"),
        (["caption", "{photos}/none", "--model", "no/such"], "does not exist"),
        (["caption", "{models}", "--model", "no/such"], "has no picture files"),
        (["mask", "{photos}", "--prompt", " ", "--model", "{models}/clipseg"], "The prompt is empty"),
        (["mask", "{photos}", "--prompt", "dog", "--model", "{models}/blip"], "not a model that can segment pictures"),
        (["mask", "{photos}", "--prompt", "dog", "--model", "no/such"], "The model 'no/such' was not found"),
    ],
)
def test_mistakes_are_answered(
    words: list[str],
    answer: str,
    photos: Path,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _damaged(models)
    assert call(monkeypatch, *(word.format(photos=photos, models=models) for word in words)) == 1
    said = capsys.readouterr().err
    assert answer in said
    assert "Traceback" not in said
    assert not list(photos.glob("*.txt"))


def _damaged(models: Path) -> None:
    """A BLIP without its text decoder's weights, one with pickled weights, and one that wants to run code."""
    from safetensors.torch import load_file, save_file

    for name in ("half", "pickled", "coded"):
        if not (models / name).exists():
            shutil.copytree(models / "blip", models / name)
    weights = load_file(models / "blip" / "model.safetensors")
    seeing = {name: one for name, one in weights.items() if "text_decoder" not in name}
    save_file(seeing, models / "half" / "model.safetensors")
    (models / "pickled" / "model.safetensors").unlink(missing_ok=True)
    torch.save(weights, models / "pickled" / "pytorch_model.bin")
    config = json.loads((models / "blip" / "config.json").read_text("utf-8"))
    own = {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}
    config |= {"model_type": "of_its_own", "auto_map": own}
    (models / "coded" / "config.json").write_text(json.dumps(config), "utf-8")
    (models / "coded" / "own.py").write_text("raise SystemExit('this was run')\n", "utf-8")


def test_of_two_processes_each_takes_its_share(photos: Path, models: Path, tmp_path: Path) -> None:
    words = ["caption", str(photos), "--model", str(models / "blip"), "--max-tokens", "3"]
    left = in_two(command_line, *words, folder=tmp_path)
    assert [one.status for one in left] == [0, 0], left
    told = "".join(one.out for one in left)
    assert sorted(line for line in told.splitlines() if "captions" in line) == [
        "1 captions written",
        "2 captions written",
    ]
    assert len(list(photos.glob("*.txt"))) == 3
