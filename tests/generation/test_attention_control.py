"""Prompt-to-prompt: the edited picture's attention maps, held to their formula, and what they keep of the source."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor

from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.attention_control import Control, Edit, controlled, edit, token_map, token_weights
from diffgraft.generation.image_input import ImageInput
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from tests.generation.test_session import bits, pixels, same
from tests.toy_family import mixer_base

STEPS = DrawSettings(steps=8)


def test_words_are_exchanged_or_added() -> None:
    begin, end = 90, 91
    source = [begin, 1, 2, 3, end, end, end]
    exchanged = token_map(source, [begin, 1, 7, 3, end, end, end])
    assert torch.equal(exchanged, torch.eye(7))
    added = token_map(source, [begin, 1, 8, 2, 3, end, end])
    assert added.argmax(0)[[0, 1, 3, 4, 5]].tolist() == [0, 1, 2, 3, 4]
    assert added.sum(0).tolist() == [1, 1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("guided", [False, True])
def test_maps_are_those_of_the_formula(guided: bool) -> None:
    """In float64 numpy: rows of the source's prompt, its negative prompt, and those of the edited picture."""
    rng = np.random.default_rng(0)
    rows, heads, places, tokens = 4 if guided else 2, 3, 5, 7
    maps = rng.random((rows, heads, places, tokens))
    mapped = np.eye(tokens)[:, [0, 2, 1, 3, 4, 5, 6]]
    mapped[:, 3] = 0  # a new token
    weights = np.array([1, 1, 2.0, 1, -1, 1, 1])
    control = Control(Edit(0.5, 0.25), 8, torch.tensor(mapped), torch.tensor(weights))
    half = rows // 2
    wanted = maps.copy()
    new = maps[half].copy()
    for token in range(tokens):
        if mapped[:, token].any():
            new[..., token] = maps[0][..., mapped[:, token].argmax()]
    wanted[half] = new * weights
    found = control.changed(torch.tensor(maps), is_cross=True)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)
    square = torch.tensor(rng.random((rows, heads, places, places)))
    assert torch.equal(control.changed(square, is_cross=False)[half], square[0])
    control.advance(4)
    wanted[half] = maps[half] * weights
    np.testing.assert_allclose(control.changed(torch.tensor(maps), is_cross=True).numpy(), wanted, rtol=1e-12)
    assert torch.equal(control.changed(square, is_cross=False), square)


@pytest.mark.parametrize("norm", [None, 2])
def test_without_changes_attention_is_that_of_diffusers(norm: int | None) -> None:
    torch.manual_seed(0)
    layer = Attention(8, 6, heads=2, dim_head=3, norm_num_groups=norm, residual_connection=norm is not None)
    x = torch.randn(2, 8, 3, 5) if norm else torch.randn(2, 15, 8)
    context = torch.randn(2, 7, 6)
    layer.set_processor(AttnProcessor())
    wanted = layer(x, context)

    class OneLayer(torch.nn.Module):
        down_blocks = ()

        @property
        def attn_processors(self) -> dict[str, AttnProcessor]:
            return {"x": AttnProcessor()}

        def set_attn_processor(self, processor: Any) -> None:
            layer.set_processor(processor["x"] if isinstance(processor, dict) else processor)

    control = Control(Edit(0, 0), 8, torch.eye(7), torch.ones(7))
    with controlled(OneLayer(), control):
        torch.testing.assert_close(layer(x, context), wanted)
    assert isinstance(layer.processor, AttnProcessor)


def test_an_edit_keeps_the_picture(base: Base) -> None:
    before = bits(base)
    processors = dict(base.unet.attn_processors)
    with Session(base) as session:
        (alone,) = pixels(session.draw("a cat in the snow", [3], STEPS))
        source, free = edit(session, "a dog in the snow", "a cat in the snow", 3, Edit(0, 0), STEPS)
        assert np.abs(pixels([free])[0] - alone).max() <= 2
        again, whole = edit(session, "a dog in the snow", "a cat in the snow", 3, Edit(1, 1), STEPS)
        assert np.abs(pixels([again]) - pixels([source])).max() <= 2
        kept = np.abs(pixels([whole]) - pixels([source])).mean()
        assert 0 < kept < 0.8 * np.abs(alone - pixels([source])[0]).mean()
        _, same_words = edit(session, "a dog in the snow", "a dog in the snow", 3, Edit(1, 1), STEPS)
        assert np.abs(pixels([same_words]) - pixels([source])).max() <= 2
        _, weighed = edit(session, "a dog in the snow", "a dog in the snow", 3, Edit(1, 1, {"snow": -2.0}), STEPS)
        assert np.abs(pixels([weighed]) - pixels([source])).mean() > 0.5
        image = ImageInput(source, 0.6)
        first, _ = edit(session, "a dog", "a dog at night", 3, Edit(), STEPS, image)
        assert first.size == source.size
    assert list(base.unet.attn_processors) == list(processors)
    assert all(base.unet.attn_processors[name] is processors[name] for name in processors)
    assert same(bits(base), before)


def test_edits_that_cannot_be_drawn(base: Base) -> None:
    session = Session(base)
    with pytest.raises(DiffgraftError, match="cross=2: must be from 0 to 1"):
        Edit(cross=2)
    with pytest.raises(DiffgraftError, match="The prompt has no 'snw' to weigh: did you mean 'snow'"):
        edit(session, "a dog", "a dog in the snow", change=Edit(weights={"snw": 2.0}))
    with pytest.raises(DiffgraftError, match="too long to be edited"):
        edit(session, "a dog, " * 60, "a cat")
    with pytest.raises(DiffgraftError, match="cannot be controlled: it is no UNet"):
        edit(Session(mixer_base()), "a dog", "a cat", settings=DrawSettings(steps=1))
    tokenizer = base.tokenizer
    ids = [1, *tokenizer("dog", add_special_tokens=False).input_ids, 2]
    assert token_weights(tokenizer, "dog", ids, {"dog": 3.0}).tolist()[1] == 3
