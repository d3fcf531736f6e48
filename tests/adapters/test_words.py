"""New words: textual inversion and pivotal tuning, in live bases, in files, and as diffusers reads them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Attached, Spec
from diffgraft.adapters.registry import get_method
from diffgraft.adapters.words import AddedTokens
from diffgraft.bases import Base, load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.bases.tokens import token_ids, truncated_text
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
    pieces = tokenizer.tokenize(WORD)
    before = table.weight.clone()
    plain = states(base, "a dog in the snow")
    live = attach(base, vectors=vectors)
    first = len(tokenizer)
    assert base.tokenizer(f"a {WORD} in the snow").input_ids[2 : 2 + vectors] == [*range(first, first + vectors)]
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
    assert base.tokenizer.tokenize(WORD) == pieces


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
    tokenizer = base.tokenizer
    dialects = ["auto", "diffgraft", "embedding" if method == "textual-inversion" else "lycoris"]
    for dialect in dialects:
        again = load_adapter(adapter.save(tmp_path / f"{dialect}.safetensors", dialect))
        assert set(again.modules) == set(adapter.modules)
        with graft(base, {again: 0.5}):
            torch.testing.assert_close(states(base, prompt), wanted)
        assert base.tokenizer is tokenizer
    with pytest.raises(DiffgraftError, match=r"the diffusers layout (requires|holds only)"):
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
    with pytest.raises(DiffgraftError, match="has words for text_encoder_2, but this base has no text_encoder_2"):
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
        first = len(tokenizer)
        assert base.tokenizer(f"a {WORD} <blik>").input_ids[2:4] == [first, first + 1]
    assert base.tokenizer is tokenizer


def test_a_word_that_two_files_teach_alike_is_taught_once(base: Base, tmp_path: Path) -> None:
    """As pivotal tuning leaves its word in two files; with other vectors it cannot be meant."""
    held = attach(base, "pivotal")
    shake(held, 1)
    both = held.adapter({})
    held.detach()
    tokenizer = base.tokenizer
    whole, word = both.save(tmp_path / "adapter.safetensors"), replace(both, deltas={}).save(tmp_path / "w.safetensors")
    with graft(base, {whole: 1.0}):
        wanted = states(base, f"a {WORD} on the beach")
    for files in ({whole: 1.0, word: 1.0}, {word: 1.0, whole: 1.0}):
        with graft(base, files):
            assert torch.equal(states(base, f"a {WORD} on the beach"), wanted)
            assert len(base.tokenizer) == len(tokenizer) + 1
            with pytest.raises(DiffgraftError, match="already added by another adapter that is applied"):
                graft(base, {word: 1.0})
    other = replace(both, deltas={}, tokens={WORD.upper(): {"text_encoder": both.tokens[WORD]["text_encoder"] + 1}})
    odd = other.save(tmp_path / "odd.safetensors")
    with pytest.raises(DiffgraftError, match=r"adapter.safetensors and .*odd.safetensors both have the word"):
        graft(base, {whole: 1.0, odd: 1.0})
    assert base.tokenizer is tokenizer


def test_what_will_not_do_is_told_and_changes_nothing(base: Base) -> None:
    table, tokenizer = base.text_encoder.get_input_embeddings(), base.tokenizer
    with pytest.raises(DiffgraftError, match="'dog</w>' is already known"):
        attach(base, word="dog</w>")
    with pytest.raises(DiffgraftError, match="set trigger="):
        attach(base, word="")
    wide = Adapter({}, {}, tokens={WORD: {"text_encoder": torch.zeros(1, 768)}})
    with pytest.raises(DiffgraftError, match="embeddings of width 768, but text_encoder of this base has width 64"):
        graft(base, {wide: 1.0})
    with pytest.raises(DiffgraftError, match="must be a method that trains weights"):
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
    taught = AddedTokens(base, {"blorp": vectors})
    assert base.tokenizer.tokenize("masks, blorpings and sks") == before
    assert len(base.tokenizer) - 1 in base.tokenizer("a blorp dog").input_ids
    taught.remove()
    for word in ("sks", "dog", "snow"):
        with pytest.raises(DiffgraftError, match=f"The word '{word}' is already known to the base"):
            AddedTokens(base, {word: vectors})
    assert base.tokenizer.tokenize("masks, blorpings and sks") == before


def vectors_of(count: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "word", ["EasyNegative", "easynegative", "<MyDog>", "bad-hands-5", "Ünïcode", "小狗", "my Dog"]
)
@pytest.mark.parametrize("capitals", ["as it is", "lower", "upper"])
def test_all_vectors_of_a_word_reach_the_text_encoder_whatever_its_capitals(word: str, capitals: str) -> None:
    base = load_base("tiny")
    first = len(base.tokenizer)
    written = {"as it is": word, "lower": word.lower(), "upper": word.upper()}[capitals]
    adapter = Adapter({}, {}, tokens={word: {"text_encoder": vectors_of(5, 64)}})
    with graft(base, {adapter: 1.0}):
        ids = base.tokenizer(f"a dog, {written}").input_ids
        assert ids[-6:-1] == [*range(first, first + 5)]
        found = states(base, f"a dog, {written}")
        torch.testing.assert_close(found, states(base, f"a dog, {word}"))
        pipe = base.pipeline()
        drawn, _ = pipe.encode_prompt(f"a dog, {written}", "cpu", 1, False)
        torch.testing.assert_close(drawn, found)


def test_words_inside_other_words_keep_their_own_vectors(base: Base) -> None:
    words = {"easynegative": 3, "easynegativev2": 2, "<Dog>": 2, "my-<dog>-two": 4}
    tokens = {word: {"text_encoder": vectors_of(count, 64, count)} for word, count in words.items()}
    first = len(base.tokenizer)
    places: dict[str, list[int]] = {}
    for word, count in words.items():
        places[word] = [*range(first, first + count)]
        first += count
    one, two = (Adapter({}, {}, tokens={word: tokens[word] for word in half}) for half in ([*words][:2], [*words][2:]))
    with graft(base, {one: 1.0, two: 1.0}):
        for prompt, found in (
            ("easynegative, easynegativev2", [*places["easynegative"], 267, *places["easynegativev2"]]),
            ("my-<dog>-two <dog><DOG>", [*places["my-<dog>-two"], *places["<Dog>"], *places["<Dog>"]]),
            ("easynegatives", base.tokenizer("easynegatives").input_ids[1:-1]),
            ("(EasyNegativeV2:1.2)", [263, *places["easynegativev2"], 281, 272, 269, 273, 264]),
        ):
            assert base.tokenizer(prompt).input_ids[1:-1] == found
        assert max(base.tokenizer("easynegatives v2easynegative").input_ids) < places["easynegative"][0]


def test_a_long_prompt_is_cut_after_its_words_are_written_out(base: Base) -> None:
    adapter = Adapter({}, {}, tokens={"<LongWord>": {"text_encoder": vectors_of(40, 64)}})
    prompt = "<longword> a dog in the snow <LongWord> at night"
    assert not truncated_text(base.tokenizer, prompt)
    with graft(base, {adapter: 1.0}):
        assert truncated_text(base.tokenizer, prompt) == "at night"
        pieces = token_ids(base.tokenizer, [prompt], all_chunks=True)
        assert pieces.shape == (1, 2, 77)
        assert int((pieces >= len(base.tokenizer) - 40).sum()) == 80


def test_two_words_that_differ_in_capitals_alone_are_refused(base: Base) -> None:
    both = {word: {"text_encoder": vectors_of(1, 64)} for word in ("<Zorp>", "<zorp>")}
    with pytest.raises(DiffgraftError, match="'<Zorp>' occurs twice; words must differ in more than case"):
        graft(base, {Adapter({}, {}, tokens=both): 1.0})
    one, two = (Adapter({}, {}, tokens={word: found}) for word, found in both.items())
    with pytest.raises(DiffgraftError, match="'<zorp>' was already added"):
        graft(base, {one: 1.0, two: 1.0})


def test_every_vector_of_a_word_with_capitals_trains(base: Base) -> None:
    live = attach(base, word="<MyDog>", vectors=4)
    base.condition(["a photo of <MyDog> in the snow"]).hidden_states.square().mean().backward()
    (rows,) = live.trainable().values()
    assert rows.grad is not None
    assert (rows.grad.abs().amax(1) > 0).all()
    live.detach()
