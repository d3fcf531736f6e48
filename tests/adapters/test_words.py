"""New words: textual inversion and pivotal tuning, in live bases, in files, and as diffusers reads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Attached, Spec, choose_layers, get_method
from diffgraft.adapters.words import TaughtWords
from diffgraft.bases import Base, load_base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from tests.adapters.toys import shake

WORD = "<zorp>"


def attach(
    base: Base, method: str = "textual-inversion", word: str = WORD, noun: str = "dog", **options: Any
) -> Attached:
    chosen = get_method(method)
    paths = {"unet": choose_layers("unet", base.unet, "attention")}
    return chosen.attach(base, Spec(paths, 2, 3.0, 0, chosen.read_options(options), word, noun))


def states(base: Base, prompt: str) -> Tensor:
    with torch.no_grad():
        return base.condition([prompt]).hidden_states


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_word_starts_as_its_noun_and_every_other_row_stays(base: Base, vectors: int) -> None:
    table, tokenizer = base.text_encoder.get_input_embeddings(), base.tokenizer
    before = table.weight.clone()
    plain = states(base, "a dog in the snow")
    live = attach(base, vectors=vectors)
    assert base.tokenizer.tokenize(f"a {WORD} in the snow")[1] == WORD
    same = "a " + " ".join(["dog"] * vectors) + " in the snow"
    torch.testing.assert_close(states(base, f"a {WORD} in the snow"), states(base, same))
    assert torch.equal(states(base, "a dog in the snow"), plain)
    assert {name: tuple(value.shape) for name, value in live.trainable().items()} == {
        f"text_encoder.{WORD}": (vectors, 64)
    }
    states_with_gradient = base.condition([f"a {WORD}"]).hidden_states
    states_with_gradient.square().mean().backward()
    assert all(value.grad is not None and value.grad.abs().min() > 0 for value in live.trainable().values())
    assert table.weight.grad is None
    shake(live)
    assert not torch.allclose(states(base, f"a {WORD} in the snow"), states(base, same))
    live.detach()
    assert base.text_encoder.get_input_embeddings() is table
    assert base.tokenizer is tokenizer
    assert torch.equal(table.weight, before)
    assert torch.equal(states(base, "a dog in the snow"), plain)
    assert WORD not in base.tokenizer.get_vocab()


def test_the_norm_is_kept_where_asked(base: Base) -> None:
    for keep in (True, False):
        live = attach(base, vectors=2, keep_norm=keep)
        (rows,) = live.trainable().values()
        start = rows.detach().norm(dim=1)
        shake(live)
        live.after_step()
        assert torch.allclose(rows.detach().norm(dim=1), start) == keep
        live.detach()


def test_without_a_noun_it_starts_at_the_mean_of_all_words(base: Base) -> None:
    live = attach(base, noun="")
    (rows,) = live.trainable().values()
    table = base.text_encoder.get_input_embeddings().table.weight
    mean = table.double().mean(0)
    torch.testing.assert_close(
        rows.detach()[0].double(), mean / mean.norm() * table.norm(dim=1).median(), rtol=1e-4, atol=1e-6
    )
    live.detach()


@pytest.mark.parametrize("method", ["textual-inversion", "pivotal"])
@pytest.mark.parametrize("vectors", [1, 2])
def test_saved_it_says_the_same(base: Base, method: str, vectors: int, tmp_path: Path) -> None:
    live = attach(base, method, vectors=vectors)
    shake(live)
    prompt = f"a {WORD} in the snow"
    wanted, adapter = states(base, prompt), live.adapter({"method": method, "trigger": WORD})
    live.detach()
    dialects = ["auto", "diffgraft", "embedding" if method == "textual-inversion" else "lycoris"]
    for dialect in dialects:
        again = load_adapter(adapter.save(tmp_path / f"{dialect}.safetensors", dialect))
        assert set(again.modules) == set(adapter.modules)
        with graft(base, {again: 0.5}):
            torch.testing.assert_close(states(base, prompt), wanted)
        assert WORD not in base.tokenizer.get_vocab()
    with pytest.raises(DiffgraftError, match="the diffusers layout is for"):
        adapter.save(tmp_path / "no.safetensors", "diffusers")


def test_diffusers_reads_our_word(base: Base, tmp_path: Path) -> None:
    live = attach(base, vectors=2)
    shake(live)
    wanted = states(base, f"a {WORD} at night")
    file = live.adapter({}).save(tmp_path / "word.safetensors")
    live.detach()
    pipe = load_base("tiny").pipeline()
    pipe.load_textual_inversion(str(tmp_path), weight_name=file.name)
    found, _ = pipe.encode_prompt(f"a {WORD} at night", "cpu", 1, False)
    torch.testing.assert_close(found, wanted)


def test_two_text_encoders_learn_a_word_each(sdxl_folder: Path, tmp_path: Path) -> None:
    base = load_base(sdxl_folder)
    live = attach(base, vectors=2)
    assert {name: value.shape[1] for name, value in live.trainable().items()} == {
        f"text_encoder.{WORD}": 32,
        f"text_encoder_2.{WORD}": 48,
    }
    shake(live)
    wanted = base.condition([f"a {WORD}"])
    adapter = live.adapter({"trigger": WORD})
    live.detach()
    file = adapter.save(tmp_path / "a.safetensors")
    with graft(base, {file: 1.0}):
        found = base.condition([f"a {WORD}"])
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states)
    torch.testing.assert_close(found.added["text_embeds"], wanted.added["text_embeds"])
    with pytest.raises(DiffgraftError, match="It has words for text_encoder_2, which this base does not have"):
        graft(load_base("tiny"), {file: 1.0})


def test_words_and_weights_of_several_files_stack(base: Base) -> None:
    first = attach(base)
    shake(first, 1)
    one = first.adapter({})
    first.detach()
    second = attach(base, "pivotal", word="<blik>", noun="cat")
    shake(second, 2)
    two = second.adapter({})
    second.detach()
    with graft(base, {one: 1.0}):
        alone = states(base, f"a {WORD} on the beach")
    tokenizer = base.tokenizer
    with graft(base, {one: 1.0, two: 1.0}):
        torch.testing.assert_close(states(base, f"a {WORD} on the beach"), alone)
        assert base.tokenizer.tokenize(f"a {WORD} <blik>") == ["a</w>", WORD, "<blik>"]
    assert base.tokenizer is tokenizer


def test_what_will_not_do_is_told_and_changes_nothing(base: Base) -> None:
    table, tokenizer = base.text_encoder.get_input_embeddings(), base.tokenizer
    with pytest.raises(DiffgraftError, match="'dog</w>' is known"):
        attach(base, word="dog</w>")
    with pytest.raises(DiffgraftError, match="set trigger="):
        attach(base, word="")
    wide = Adapter({}, {}, tokens={WORD: {"text_encoder": torch.zeros(1, 768)}})
    with pytest.raises(DiffgraftError, match="vectors of width 768, and text_encoder of this base has 64"):
        graft(base, {wide: 1.0})
    with pytest.raises(DiffgraftError, match="has no weights: name a method that has"):
        attach(base, "pivotal", weights="textual-inversion")
    with pytest.raises(DiffgraftError, match="did you mean 'lora'"):
        attach(base, "pivotal", weights="lorra")
    live = attach(base)
    other = attach(base, word="<other>")
    with pytest.raises(DiffgraftError, match="Other words were added after these"):
        live.detach()
    other.detach()
    live.detach()
    assert base.text_encoder.get_input_embeddings() is table
    assert base.tokenizer is tokenizer


def test_a_plain_word_is_not_found_inside_others_and_known_ones_are_refused() -> None:
    base = load_base("tiny")
    before = base.tokenizer.tokenize("masks, blorpings and sks")
    vectors = {"text_encoder": torch.ones(1, 64)}
    taught = TaughtWords(base, {"blorp": vectors})
    assert base.tokenizer.tokenize("masks, blorpings and sks") == before
    assert "blorp" in base.tokenizer.tokenize("a blorp dog")
    taught.remove()
    for word in ("sks", "dog", "snow"):
        with pytest.raises(DiffgraftError, match=f"The word '{word}' is known to the base already"):
            TaughtWords(base, {word: vectors})
    assert base.tokenizer.tokenize("masks, blorpings and sks") == before
