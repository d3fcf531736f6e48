"""Text states held to small re-implementations of webui's and ComfyUI's arithmetic, token by token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgraft.adapters.words import AddedTokens
from diffgraft.bases import Base, load_base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.grammar.attention import Piece
from diffgraft.generation.grammar.chunks import chunks_of
from diffgraft.generation.grammar.encode import EMPHASES, Encoding, encode_texts
from tests.toy_family import MixerFamily

WEIGHTED = "a (red dog:1.3), [blue] cat"
WORDS = {"a": 1.0, "red": 1.3, "dog": 1.3, ",": 1.0, "blue": 1 / 1.1, "cat": 1.0}


def row(tokenizer: Any, weights: dict[str, float]) -> tuple[list[int], list[float]]:
    """Ids and weights of a chunk, from one id for each word."""
    ids = [tokenizer.bos_token_id, *(tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in weights)]
    ids += [tokenizer.eos_token_id]
    pad = [tokenizer.pad_token_id] * (77 - len(ids))
    return ids + pad, [1.0, *weights.values(), *[1.0] * (76 - len(weights))]


@torch.no_grad()
def last_state(base: Base, ids: list[int]) -> Tensor:
    state: Tensor = base.text_encoder(torch.tensor([ids]))[0][0]
    return state


@pytest.mark.parametrize("emphasis", EMPHASES)
def test_webui_weighs_hidden_states(base: Base, emphasis: Any) -> None:
    ids, weights = row(base.tokenizer, WORDS)
    state, told = last_state(base, ids).double(), torch.tensor(weights, dtype=torch.float64)[:, None]
    wanted = state * told if emphasis in ("original", "no-norm") else state
    if emphasis == "original":
        wanted = wanted * (state.mean() / wanted.mean())
    text = "a red dog, blue cat" if emphasis == "none" else WEIGHTED
    found = encode_texts(base, [text], Encoding(emphasis=emphasis)).hidden_states
    assert found.shape == (1, 77, 64)
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-5, atol=1e-5)


def test_without_emphasis_brackets_are_text(base: Base) -> None:
    found = encode_texts(base, [WEIGHTED], Encoding(emphasis="none")).hidden_states
    torch.testing.assert_close(found, base.condition([WEIGHTED]).hidden_states, rtol=0, atol=0)


def test_comfyui_weighs_the_difference_to_the_empty_prompt(base: Base) -> None:
    weights = {"a": 1.0, "red": 1.3, "dog": 0.5, "cat": 1.1}
    ids, numbers = row(base.tokenizer, weights)
    nothing, _ = row(base.tokenizer, {})
    state, empty = last_state(base, ids).double(), last_state(base, nothing).double()
    wanted = empty + torch.tensor(numbers, dtype=torch.float64)[:, None] * (state - empty)
    found = encode_texts(base, ["a (red (dog:0.5):1.3) (cat)"], Encoding("comfyui")).hidden_states
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-5, atol=1e-5)


def test_texts_of_one_prompt_share_their_mean(base: Base) -> None:
    """As in webui, where the other half of a change moves this one a little; each chunk has a mean of its own."""
    ids, weights = row(base.tokenizer, WORDS)
    plain, _ = row(base.tokenizer, {"a": 1.0, "cat": 1.0})
    states = torch.stack([last_state(base, ids), last_state(base, plain)]).double()
    scaled = states * torch.tensor([weights, [1.0] * 77], dtype=torch.float64)[..., None]
    wanted = scaled * (states.mean() / scaled.mean())
    found = encode_texts(base, [WEIGHTED, "a cat"], Encoding()).hidden_states
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    broken = encode_texts(base, [f"{WEIGHTED} BREAK a cat", "a cat BREAK a cat"], Encoding()).hidden_states
    torch.testing.assert_close(broken[:, :77], found, rtol=0, atol=1e-6)
    torch.testing.assert_close(broken[0, 77:], base.condition(["a cat"]).hidden_states[0], rtol=0, atol=1e-6)


def test_plain_prompts_are_what_training_sees(base: Base, folders: Path) -> None:
    for held in (base, load_base(folders / "sdxl")):
        told = held.condition(["a red dog", ""])
        for encoding in (Encoding(), Encoding("comfyui")):
            found = encode_texts(held, ["a red dog", ""], encoding)
            torch.testing.assert_close(found.hidden_states, told.hidden_states, rtol=0, atol=0)
            for name, value in found.added.items():
                torch.testing.assert_close(value, told.added[name], rtol=0, atol=0)


def test_both_encoders_of_xl_are_weighed_apart(folders: Path) -> None:
    held = load_base(folders / "sdxl")
    found = encode_texts(held, [WEIGHTED], Encoding())
    states = []
    for tokenizer, encoder in ((held.tokenizer, held.text_encoder), (held.tokenizer_2, held.text_encoder_2)):
        ids, weights = row(tokenizer, WORDS)
        with torch.no_grad():
            out = encoder(torch.tensor([ids]), output_hidden_states=True)
        state = out.hidden_states[-2][0].double()
        scaled = state * torch.tensor(weights, dtype=torch.float64)[:, None]
        states.append(scaled * (state.mean() / scaled.mean()))
    torch.testing.assert_close(found.hidden_states[0].double(), torch.cat(states, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.added["text_embeds"], held.condition(["a red dog, blue cat"]).added["text_embeds"])


@torch.no_grad()
def test_clip_skip_counts_from_the_last_layer(base: Base, folders: Path) -> None:
    ids, _ = row(base.tokenizer, {"a": 1.0, "dog": 1.0})
    out = base.text_encoder(torch.tensor([ids]), output_hidden_states=True)
    for skip in (1, 2, 3):
        wanted = base.text_encoder.final_layer_norm(out.hidden_states[-skip])
        found = encode_texts(base, ["a dog"], Encoding(clip_skip=skip)).hidden_states
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    xl = load_base(folders / "sdxl")
    one, two = (encode_texts(xl, ["a dog"], Encoding(clip_skip=skip)).hidden_states for skip in (1, 2))
    assert torch.equal(one, two)
    with pytest.raises(DiffgraftError, match=r"clip_skip=9: this base's text encoder has \d layers"):
        encode_texts(base, ["a dog"], Encoding(clip_skip=9))
    with pytest.raises(DiffgraftError, match="clip_skip=0: must be at least 1"):
        Encoding(clip_skip=0)
    with pytest.raises(DiffgraftError, match="emphasis='loud': must be one of"):
        Encoding(emphasis="loud")  # type: ignore[arg-type]


def lengths(base: Base, text: str, style: Any = "webui", weight: float = 1.0) -> list[int]:
    chunks = chunks_of(base.tokenizer, [Piece(text, weight)], style)
    assert all(len(chunk.ids) == len(chunk.weights) <= 75 for chunk in chunks)
    assert all(weight == piece for chunk in chunks for piece in chunk.weights)
    return [len(chunk.ids) for chunk in chunks]


def test_webui_cuts_after_a_comma_that_is_near(base: Base) -> None:
    assert lengths(base, "") == [0]
    assert lengths(base, "dog " * 75) == [75]
    assert lengths(base, "dog " * 76) == [75, 1]
    assert lengths(base, "dog " * 60 + "," + "cat " * 20, weight=1.2) == [61, 20]
    assert lengths(base, "dog " * 55 + "," + "cat " * 25) == [56, 25]  # 20 tokens from the end
    assert lengths(base, "dog " * 54 + "," + "cat " * 25) == [75, 5]
    assert lengths(base, "dog " * 74 + "," + "cat") == [75, 1]
    assert lengths(base, "dog " * 75 + "," + "cat") == [75, 2]
    assert lengths(base, ("dog " * 29 + ",") * 6) == [60, 60, 60]


def test_breaks_end_a_chunk(base: Base) -> None:
    def counted(*pieces: tuple[str, float]) -> list[int]:
        return [len(chunk.ids) for chunk in chunks_of(base.tokenizer, [Piece(*piece) for piece in pieces])]

    stop = ("BREAK", -1.0)
    assert counted(("a dog", 1.0), stop, ("a cat", 1.2)) == [2, 2]
    assert counted(stop, ("a cat", 1.0)) == [0, 2]
    assert counted(("a cat", 1.0), stop) == [2]
    assert counted(("a", 1.0), stop, stop, ("b", 1.0)) == [1, 0, 1]


def test_comfyui_cuts_between_words(base: Base) -> None:
    long = "zorpzorp"  # of several tokens
    count = len(base.tokenizer(long, add_special_tokens=False).input_ids)
    assert 2 < count < 8
    assert lengths(base, "dog " * 74 + long, "comfyui") == [74, count]
    assert lengths(base, "dog " * 74 + long) == [75, count - 1]
    longer = long * 4
    count = len(base.tokenizer(longer, add_special_tokens=False).input_ids)
    assert count >= 8
    assert lengths(base, "dog " * 74 + longer, "comfyui") == [75, count - 1]


def test_a_word_of_several_vectors_is_never_cut() -> None:
    held = load_base("tiny")
    width = held.text_encoder.config.hidden_size
    words = {"<zorp>": {"text_encoder": torch.randn(4, width)}, "<blim>": {"text_encoder": torch.randn(80, width)}}
    added = AddedTokens(held, words)
    try:
        assert lengths(held, "dog " * 71 + "<zorp>") == [75]
        assert lengths(held, "dog " * 72 + "<zorp>") == [72, 4]
        assert lengths(held, "<zorp> <zorp> " * 18 + "<ZORP> dog") == [72, 72, 5]
        assert lengths(held, "dog <blim> dog") == [1, 75, 6]
        assert lengths(held, "dog " * 72 + "embedding:<zorp>", "comfyui") == [72, 4]
        found = encode_texts(held, ["a <zorp>"], Encoding()).hidden_states
        torch.testing.assert_close(found, held.condition(["a <zorp>"]).hidden_states, rtol=0, atol=0)
    finally:
        added.remove()


def test_a_family_without_token_weights_says_so(base: Base) -> None:
    with pytest.raises(DiffgraftError, match="have no weights of words"):
        MixerFamily().text_states(base, [])
