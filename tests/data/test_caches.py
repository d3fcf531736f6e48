"""Latents and text states are computed once; what has changed is computed anew, and what is broken is made again."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffgraft.bases import Base, load_base
from diffgraft.data.cache import checksum
from diffgraft.data.class_images import class_images
from diffgraft.data.frames import frames, with_mirrored
from diffgraft.data.image_folder import read_folder, read_source
from diffgraft.data.latents import Encoded, encode, encode_pictures
from diffgraft.data.pictures import Picture, crop_to_square
from diffgraft.data.settings import Buckets
from diffgraft.data.text_embeddings import TextEmbeddingCache
from diffgraft.generation.settings import DrawSettings


class Asked:
    """Counts how often a part of a base is asked."""

    def __init__(self, module: Any, name: str, patch: pytest.MonkeyPatch) -> None:
        self.count, real = 0, getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return real(*args, **kwargs)

        patch.setattr(module, name, counted)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFGRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encoded(base: Base, pictures: list[Picture], **more: Any) -> Encoded:
    ways = [with_mirrored(frames(one.size, 64, Buckets(use=True), 8)) for one in pictures]
    return encode_pictures(base, pictures, ways, **more)


def same(one: Encoded, other: Encoded) -> bool:
    pairs = [(one.latents[row], other.latents[row]) for row in range(len(one.latents))]
    return len(one.latents) == len(other.latents) and all(
        torch.equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True)
    )


def test_latents_are_encoded_once_and_are_the_same_bits(
    base: Base, pictures: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, asked = read_folder(pictures), Asked(base.vae, "encode", monkeypatch)
    bare = encoded(base, found, keep=False)
    assert not cache.exists()
    first = encoded(base, found)
    again = encoded(base, found)
    assert asked.count == 20
    assert same(bare, first)
    assert same(first, again)
    assert [len(rows) for rows in first.rows.values()] == [2] * 5


@pytest.mark.usefixtures("cache")
def test_what_has_changed_is_encoded_anew(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, colour in (("a.png", 10), ("b.png", 90)):
        Image.new("RGB", (96, 64), (colour, 80, 9)).save(tmp_path / name)
    first = encoded(base, read_folder(tmp_path))
    asked = Asked(base.vae, "encode", monkeypatch)
    Image.new("RGB", (96, 64), (200, 80, 9)).save(tmp_path / "a.png")
    second = encoded(base, read_folder(tmp_path))
    assert asked.count == 2
    assert not torch.equal(first.latents[0][0], second.latents[0][0])
    assert torch.equal(first.latents[2][0], second.latents[2][0])
    other = load_base("tiny")
    with torch.no_grad():
        other.vae.encoder.conv_in.bias[0] += 1e-3
    asked = Asked(other.vae, "encode", monkeypatch)
    encoded(other, read_folder(tmp_path))
    assert asked.count == 4
    other.vae.register_to_config(scaling_factor=0.31)
    third = encoded(other, read_folder(tmp_path))
    assert asked.count == 8
    assert torch.allclose(third.latents[0][0] / 0.31, second.latents[0][0] / base.vae.config.scaling_factor, atol=0.05)


@pytest.mark.parametrize("damage", ["cut", "swapped", "empty", "other"])
def test_a_broken_file_of_the_cache_is_made_again(
    base: Base, pictures: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    found = read_folder(pictures)[:2]
    wanted = encoded(base, found)
    file = sorted(cache.rglob("*.safetensors"))[1]
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "other":
        save_file({"something": torch.zeros(2, 3)}, file)
    else:  # one bit of one number, which a reader of safetensors does not see
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:])
    asked = Asked(base.vae, "encode", monkeypatch)
    assert same(wanted, encoded(base, found))
    assert asked.count == 1
    assert file.read_bytes() == whole


def test_latents_that_are_not_held_are_read_from_their_files(
    base: Base, pictures: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = encoded(base, read_folder(pictures))
    monkeypatch.setattr("diffgraft.data.latents._IN_MEMORY", 5 * 8 * 16 * 16 * 4)
    found = encoded(base, read_folder(pictures))
    assert same(wanted, found)
    spread = torch.randn(2, *wanted.latents.shape(9))
    assert torch.equal(wanted.latents.sample([9, 0], spread), found.latents.sample([9, 0], spread))
    for file in cache.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(OSError, match="damaged while it was in use"):
        found.latents[9]


@pytest.mark.usefixtures("cache")
def test_a_picture_that_breaks_off_is_left_out(base: Base, tmp_path: Path) -> None:
    Image.effect_noise((300, 200), 60).convert("RGB").save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    Image.new("RGB", (90, 60)).save(tmp_path / "c.jpg")
    pictures = read_source(tmp_path, thorough=False)
    with pytest.warns(UserWarning, match=r"b\.jpg is left out"):
        found = encoded(base, pictures)
    assert found.rows == {0: range(0, 2), 2: range(2, 4)}


@pytest.mark.usefixtures("cache")
def test_squares_are_encoded_as_before(base: Base, pictures: Path) -> None:
    found = read_folder(pictures)
    ways = [frames(one.size, 48, Buckets(), 8) for one in found]
    kept = encode_pictures(base, found, ways)
    plain = encode(base, [one.image for one in found], 48)
    for row in range(5):
        torch.testing.assert_close(kept.latents[row][0], plain[row][0], atol=1e-5, rtol=1e-5)
    assert crop_to_square(found[0].image, 48).size == (48, 48)


@pytest.mark.usefixtures("cache")
def test_masks_are_cut_and_mirrored_with_their_pictures(base: Base, tmp_path: Path) -> None:
    Image.new("RGB", (128, 64)).save(tmp_path / "a.png")
    mask = Image.new("L", (128, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "a_mask.png")
    (picture,) = read_folder(tmp_path)
    ways = [with_mirrored(frames(picture.size, 64, Buckets(), 8))]
    plain, turned = encode_pictures(base, [picture], ways, masked=True).masks
    assert plain is not None
    assert turned is not None
    assert plain.shape == turned.shape == (16, 16)
    assert plain[:, 1:7].min() > 0.9
    assert plain[:, 9:].max() < 0.1
    assert torch.equal(turned, plain.flip(1))
    assert encode_pictures(base, [picture], ways).masks == [None, None]


def test_texts_are_encoded_once_and_are_the_same_bits(base: Base, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["a dog", "a red cat in the snow", ""]
    with torch.no_grad():
        wanted = [base.family.encode(base, [prompt], False).hidden_states for prompt in prompts]
    first = TextEmbeddingCache(base, keep=True)
    first.prepare(prompts)
    asked = Asked(base.text_encoder, "forward", monkeypatch)
    second = TextEmbeddingCache(base, keep=True)
    second.prepare(prompts)
    for texts in (first, second):
        assert torch.equal(texts(prompts).hidden_states, torch.cat(wanted))
    assert asked.count == 0
    (file, *_) = sorted(cache.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    third = TextEmbeddingCache(base, keep=True)
    third.prepare(prompts)
    assert asked.count == 1
    assert torch.equal(third(prompts).hidden_states, torch.cat(wanted))
    assert load_file(file)["hidden_states"].shape == (1, 77, 64)


def test_few_prompts_are_held_where_they_are_without_number(base: Base) -> None:
    texts = TextEmbeddingCache(base, limit=3)
    for number in range(6):
        texts([f"a dog {number}", "a cat"])
    assert len(texts._cached) == 3


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_long_prompts_are_read_in_pieces(family: str, folders: Path) -> None:
    """Each piece is what the encoder says of it alone; shorter prompts are filled up with empty pieces."""
    base = load_base(folders / family)
    words = ["a", "dog", "with", "a", "red", "hat", "and", "a", "blue", "coat"] * 16
    long, short = " ".join(words[:100]), "a cat"
    texts = TextEmbeddingCache(base, whole=True)
    with torch.no_grad():
        found = texts([long, short])
        together = base.family.encode(base, [long, short], True)
        first = base.family.encode(base, [" ".join(words[:75]), short], False)
        second = base.family.encode(base, [" ".join(words[75:100]), ""], False)
    torch.testing.assert_close(found.hidden_states, together.hidden_states)
    assert found.hidden_states.shape[1] == 2 * 77
    torch.testing.assert_close(found.hidden_states[:, :77], first.hidden_states)
    torch.testing.assert_close(found.hidden_states[:, 77:], second.hidden_states)
    for name, value in first.added.items():
        torch.testing.assert_close(found.added[name], value)


@pytest.mark.usefixtures("cache")
def test_texts_are_known_by_what_says_them(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text encoder, another precision, or prompts read whole: each says something else."""
    prompt = "a dog"
    TextEmbeddingCache(base, keep=True).prepare([prompt])
    other, half = load_base("tiny"), load_base("tiny", torch.bfloat16)
    with torch.no_grad():
        other.text_encoder.get_input_embeddings().weight[320] += 0.5
    other = replace(other)
    for held, whole in ((other, False), (half, False), (base, True)):
        asked = Asked(held.text_encoder, "forward", monkeypatch)
        texts = TextEmbeddingCache(held, whole=whole, keep=True)
        texts.prepare([prompt])
        assert asked.count == 1
        with torch.no_grad():
            wanted = held.family.encode(held, [prompt], whole).hidden_states
        assert torch.equal(texts([prompt]).hidden_states, wanted)


def flipped(content: bytes, at: int) -> bytes:
    """One bit of the byte at `at`, from the end."""
    return content[: len(content) - at] + bytes([content[-at] ^ 64]) + content[len(content) - at + 1 :]


def test_a_flipped_bit_in_text_states_is_noticed(base: Base, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["a dog", "a cat in the snow"]
    texts = TextEmbeddingCache(base, keep=True)
    texts.prepare(prompts)
    wanted = texts(prompts).hidden_states
    files = sorted((cache / "texts").rglob("*.safetensors"))
    whole = files[0].read_bytes()
    files[0].write_bytes(flipped(whole, 11))
    files[1].unlink()
    os.mkfifo(files[1])  # who reads it waits for ever
    asked = Asked(base.text_encoder, "forward", monkeypatch)
    again = TextEmbeddingCache(base, keep=True)
    again.prepare(prompts)
    assert torch.equal(again(prompts).hidden_states, wanted)
    assert asked.count == 2
    assert files[0].read_bytes() == whole


def test_half_precision_has_a_checksum_too() -> None:
    values = {"a": torch.tensor([[1.0, 2.0, 3.0]]), "b": torch.tensor(2.0)}
    sums = {checksum({name: value.to(dtype) for name, value in values.items()}) for dtype in (torch.bfloat16, None)}
    assert len(sums) == 2
    assert checksum(values) != checksum({**values, "b": torch.tensor(-2.0)})
    assert checksum({"a": torch.zeros(2, 3)}) != checksum({"a": torch.zeros(3, 2)})


def test_a_cache_that_cannot_be_written_is_done_without(
    base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DIFFGRAFT_CACHE", str(tmp_path / "file" / "cache"))
    found = read_folder(pictures)[:2]
    bare = encoded(base, found, keep=False)
    monkeypatch.setattr("diffgraft.data.latents._IN_MEMORY", 0)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert same(bare, encoded(base, found))
    with pytest.warns(UserWarning, match="cannot be written"):
        TextEmbeddingCache(base, keep=True).prepare(["a dog"])
    with pytest.warns(UserWarning, match="cannot be written"):
        drawn = class_images(base, ["a dog"], 3, DrawSettings(steps=2), 1)
    assert [picture.image.size for _, picture in drawn] == [(64, 64)] * 3


def test_a_damaged_class_image_is_drawn_again(base: Base, cache: Path) -> None:
    drawn = class_images(base, ["a dog"], 3, DrawSettings(steps=2), 1)
    wanted = [picture.read() for _, picture in drawn]
    files = sorted(cache.rglob("*.png"))
    files[0].write_bytes(flipped(wanted[0], len(wanted[0]) // 2))
    files[1].write_bytes(wanted[1][:100])
    files[2].unlink()
    files[2].mkdir()
    files[2].rmdir()
    os.mkfifo(files[2])
    again = class_images(base, ["a dog"], 3, DrawSettings(steps=2), 1)
    assert [picture.read() for _, picture in again] == wanted


def test_class_images_that_cannot_be_kept_at_the_last_moment_are_used_all_the_same(base: Base, cache: Path) -> None:
    wanted = [picture.read() for _, picture in class_images(base, ["a dog"], 2, DrawSettings(steps=2), 1)]
    file = next(cache.rglob("0001.png"))
    file.unlink()
    file.mkdir()  # the name cannot be taken, though all of the file was written
    with pytest.warns(UserWarning, match="cannot be written"):
        again = class_images(base, ["a dog"], 2, DrawSettings(steps=2), 1)
    assert [picture.read() for _, picture in again] == wanted
