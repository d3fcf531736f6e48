"""Aesthetic gradients: embeddings of folders, and text encoders that are tuned for each prompt."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel
from typer.testing import CliRunner

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.methods.aesthetic import AestheticEmbedding, AestheticOptions, read_network, without_tuning
from diffgraft.bases import Base
from diffgraft.bases.clip import load_clip
from diffgraft.bases.tokens import token_ids
from diffgraft.cli.main import app
from diffgraft.data.aesthetic import aesthetic_adapter, mean_embedding, pooled_states, projection_for
from diffgraft.data.image_folder import read_folder
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from diffgraft.generation.metadata import save_drawing
from diffgraft.generation.regenerate import Sources, regenerate
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.pixels import to_tensor

STEPS, RATE, WIDTH = 4, 2e-3, 24
QUICK = DrawSettings(steps=3)


def embedding(seed: int = 3, **settings: Any) -> AestheticEmbedding:
    """A random embedding for `tiny`, whose text encoder has a width of 64."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "embedding": torch.randn(1, WIDTH, generator=generator),
        "projection": torch.randn(WIDTH, 64, generator=generator),
    }
    return AestheticEmbedding(tensors, {"steps": STEPS, "learning_rate": RATE, **settings})


def adapter(seed: int = 3, **settings: Any) -> Adapter:
    return Adapter({}, {"method": "aesthetic"}, (embedding(seed, **settings),))


def as_the_extension(encoder: CLIPTextModel, ids: Tensor, network: AestheticEmbedding) -> tuple[Tensor, list[float]]:
    """The extension's steps on a copy of the text encoder, for one prompt [1, tokens]; its hidden states and losses."""
    model, losses = deepcopy(encoder), []
    model.requires_grad_(True)
    image_embs = network.tensors["embedding"] / network.tensors["embedding"].norm(dim=-1, keepdim=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        text_embs = model(input_ids=ids).pooler_output @ network.tensors["projection"].T
        text_embs = text_embs / text_embs.norm(dim=-1, keepdim=True)
        loss = -(text_embs @ image_embs.T)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        states: Tensor = model(input_ids=ids).last_hidden_state
    return states, losses


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_prompts_are_encoded_as_by_the_extension(base: Base, strength: float) -> None:
    before = deepcopy(base.text_encoder.state_dict())
    ids = token_ids(base.tokenizer, ["a red car on the beach", "a watercolour painting of a fox"])[:, 0]
    with torch.no_grad():
        own = base.text_encoder(ids).last_hidden_state
    with graft(base, {adapter(): strength}), torch.no_grad():
        found = base.text_encoder(ids, output_hidden_states=True)
        with without_tuning():
            assert torch.equal(base.text_encoder(ids).last_hidden_state, own)
    for row in range(2):
        tuned, losses = as_the_extension(base.text_encoder, ids[row : row + 1], embedding())
        assert losses[-1] < losses[0]
        wanted = own[row] * (1 - strength) + tuned[0] * strength
        torch.testing.assert_close(found.last_hidden_state[row], wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - own[row]).abs().max() > 0.01
    assert len(found.hidden_states) == base.text_encoder.config.num_hidden_layers + 1
    after = base.text_encoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        assert torch.equal(base.text_encoder(ids).last_hidden_state, own), "the hook is gone"


def test_an_empty_prompt_says_nothing_that_could_be_tuned(base: Base) -> None:
    ids = token_ids(base.tokenizer, ["", "a dog"])[:, 0]
    with torch.no_grad():
        own = base.text_encoder(ids).last_hidden_state
        with graft(base, adapter()):
            found = base.text_encoder(ids).last_hidden_state
    assert torch.equal(found[0], own[0])
    assert not torch.equal(found[1], own[1])


def test_two_embeddings_are_tuned_one_by_one(base: Base) -> None:
    ids = token_ids(base.tokenizer, ["a dog"])[:, 0]
    with torch.no_grad():
        own = base.text_encoder(ids).last_hidden_state
        with graft(base, {adapter(3): 0.5, adapter(4): 0.25}):
            found = base.text_encoder(ids).last_hidden_state
    first, second = (as_the_extension(base.text_encoder, ids, embedding(seed))[0] for seed in (3, 4))
    torch.testing.assert_close(found, (own * 0.5 + first * 0.5) * 0.75 + second * 0.25, rtol=1e-5, atol=1e-5)


def test_a_session_tunes_positive_prompts_alone(base: Base, tmp_path: Path) -> None:
    file = adapter().save(tmp_path / "ink.safetensors")
    loaded = load_adapter(file)
    assert dict(loaded.networks[0].settings) == {"steps": STEPS, "learning_rate": RATE}
    weights = deepcopy(base.text_encoder.state_dict())
    with Session(base, library=tmp_path) as session:
        plain = session.draw("a dog", settings=QUICK)[0]
        session.use(file)
        drawn = session.draw("a dog", settings=QUICK)[0]
        again = session.draw("a dog", settings=QUICK)[0]
        session.remove("ink")
        tagged = session.draw("a dog <lora:ink:1>", settings=QUICK)[0]
        session.use(file, {"text_encoder": 0.0})
        off = session.draw("a dog", settings=QUICK)[0]
    assert drawn.tobytes() != plain.tobytes()
    assert drawn.tobytes() == again.tobytes() == tagged.tobytes()
    assert off.tobytes() == plain.tobytes()
    assert all(torch.equal(base.text_encoder.state_dict()[name], value) for name, value in weights.items())


def test_a_negative_prompt_is_not_tuned(base: Base) -> None:
    settings = DrawSettings(steps=2, negative="a cat in the snow")
    states = []

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not output.last_hidden_state.requires_grad:  # else it is a step of tuning
            states.append((args[0] if args else kwargs["input_ids"], output.last_hidden_state.clone()))

    with Session(base) as session:
        session.use(adapter(), name="x")
        handle = base.text_encoder.register_forward_hook(record, with_kwargs=True)  # it comes after the embedding's
        try:
            session.draw("a dog", settings=settings)
        finally:
            handle.remove()
    negative = token_ids(base.tokenizer, ["a cat in the snow"])[:, 0]
    with torch.no_grad():
        own = base.text_encoder(negative).last_hidden_state
    seen = [state for ids, state in states if torch.equal(ids, negative)]
    assert seen
    assert all(torch.equal(state, own) for state in seen)


def test_a_picture_is_drawn_again_from_its_record(base: Base, tmp_path: Path) -> None:
    file = adapter().save(tmp_path / "ink.safetensors")
    with Session(base, library=tmp_path) as session:
        session.use(file, 0.8)
        picture = session.draw("a dog", settings=QUICK)[0]
        save_drawing(picture, tmp_path / "dog.png")
    again = regenerate(tmp_path / "dog.png", Sources(base=base, library=tmp_path))
    assert again.has_same_pixels
    assert not again.differences


def test_the_mean_is_of_unit_vectors(pictures: Path) -> None:
    clip = load_clip("tiny")
    found, count = mean_embedding(clip, pictures)
    images = [to_tensor([picture.image]) / 2 + 0.5 for picture in read_folder(pictures)]
    rows = []
    for image in images:
        pixels = F.interpolate(image, (64, 64), mode="bicubic", antialias=True) * 2 - 1
        vector = clip.model.visual_projection(clip.model.vision_model(pixel_values=pixels).pooler_output)[0]
        rows.append(vector / vector.norm())
    assert count == len(rows) > 1
    torch.testing.assert_close(found[0], torch.stack(rows).mean(0))


def test_a_projection_is_fitted_for_another_text_encoder(base: Base) -> None:
    clip = load_clip("tiny")
    fitted = projection_for(clip, base)
    assert fitted.matrix.shape == (clip.width, 64)
    assert fitted.cosine is not None
    assert fitted.cosine > 0.8
    x = pooled_states(base, ["a dog in the snow", "a cat in the snow", "a dog at night"])
    with torch.no_grad():
        y = clip.text_features(["a dog in the snow", "a cat in the snow", "a dog at night"])
    assert torch.equal((F.normalize(x @ fitted.matrix.T, dim=-1) @ y.T).argmax(1), torch.arange(3))
    other = deepcopy(base)
    other.name = "other"
    with pytest.raises(DiffgraftError, match=r"4 layers of width 64\) is not that of the CLIP tiny"):
        projection_for(clip, other)
    other.text_encoder = deepcopy(clip.model.text_model)
    assert torch.equal(projection_for(clip, other).matrix, clip.text_projection)


def test_what_an_embedding_cannot_be_used_on_is_told(base: Base, tmp_path: Path) -> None:
    wide = AestheticEmbedding({"embedding": torch.ones(1, 8), "projection": torch.ones(8, 48)}, {})
    with pytest.raises(DiffgraftError, match="for CLIP text encoders of width 48, but this base has a CLIPTextModel"):
        graft(base, Adapter({}, {"method": "aesthetic"}, (wide,)))
    for tensors, settings, reason in (
        ({"embedding": torch.ones(1, 8), "projection": torch.ones(7, 48)}, {}, "its projection is 7 × 48, expected 8"),
        ({"embedding": torch.ones(1, 8)}, {"steps": -1}, "its settings are invalid"),
        ({"embedding": torch.ones(1, 8), "more": torch.ones(2)}, {}, "has no tensor more"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_network(tensors, settings)
    torch.save(torch.randn(1, 768), tmp_path / "fantasy.pt")
    with pytest.raises(DiffgraftError, match="embedding of 768 numbers, but those of the CLIP tiny have 64"):
        aesthetic_adapter(tmp_path / "fantasy.pt", load_clip("tiny"), None, AestheticOptions())


def test_the_command_writes_files_for_both_programs(pictures: Path, tmp_path: Path) -> None:
    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, ["aesthetic", *map(str, arguments)])

    plain, full = tmp_path / "mine.pt", tmp_path / "mine.safetensors"
    assert run(pictures, "--clip", "tiny", "-o", plain).exit_code == 0
    row = torch.load(plain, weights_only=True)
    assert row.shape == (1, 64)
    done = run(plain, "--clip", "tiny", "--base", "tiny", "--steps", 7, "--lr", 1e-3, "-o", full)
    assert done.exit_code == 0, done.output
    assert "projection fitted: cosine 0." in done.output
    network = load_adapter(full).networks[0]
    assert torch.equal(network.tensors["embedding"], row)
    assert network.settings["steps"] == 7
    assert run(pictures, "--clip", "tiny", "-o", full).exit_code != 0  # it exists
    with pytest.raises(DiffgraftError, match="no room for the projection"):
        load_adapter(full).save(tmp_path / "again.pt", "aesthetic")
    with pytest.raises(DiffgraftError, match=r"only embeddings that end in \.pt"):
        load_adapter(plain).save(tmp_path / "again.bin", "aesthetic")
