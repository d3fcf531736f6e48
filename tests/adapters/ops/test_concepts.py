"""The merging of concepts against the conditions of its optimum, solved by NumPy, and on whole bases."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import diffgraft as dg
from diffgraft.adapters.adapter import Adapter, LinearDelta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Spec
from diffgraft.adapters.methods.full import FullDelta
from diffgraft.adapters.ops.concepts import CONTEXTS, ConceptStates, concept_states, constrained_change, merge_concepts
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from tests.adapters.toys import shake

THINGS = ("dog", "cat", "house", "tree", "car", "robot", "man", "woman")
PLACES = ("in the snow", "on the beach", "at night", "in a city", "under water", "on a table")
CAPTIONS = [f"{article} {thing} {place}" for article in ("a", "the old") for thing in THINGS for place in PLACES]


def concept(base: Base, word: str, noun: str, seed: int) -> Adapter:
    """As the method `custom` trains it, every parameter moved off its start."""
    method = get_method("custom")
    paths = {"unet": choose_layers("unet", base.unet, "context")}
    live = method.attach(base, Spec(paths, 1, 1.0, 0, method.read_options({}), word, noun))
    shake(live, seed=seed, size=0.1)
    adapter = live.adapter({"method": "custom", "trigger": word, "class": noun, "base": {"family": base.family.name}})
    live.detach()
    return adapter


def test_it_is_the_solution_of_the_conditions_of_karush_kuhn_and_tucker() -> None:
    """For each output w: minimal (w − w₀) G (w − w₀)ᵀ with C w = v, as one linear system of w and the multipliers."""
    rng = np.random.default_rng(5)
    out, width, sizes = 7, 11, (2, 3)
    regular, base = rng.normal(size=(60, width)) * rng.uniform(0.1, 4, width), rng.normal(size=(out, width))
    words = [rng.normal(size=(size, width)) for size in sizes]
    changes = [rng.normal(size=(out, width)) for _ in sizes]
    gram, c = regular.T @ regular, np.concatenate(words)
    v = np.concatenate([own @ (base + change).T for own, change in zip(words, changes, strict=True)])
    system = np.block([[gram, c.T], [c, np.zeros((len(c), len(c)))]])
    wanted = np.linalg.solve(system, np.concatenate([gram @ base.T, v]))[:width].T
    states = ConceptStates([torch.tensor(own) for own in words], torch.tensor(gram))
    up, down = constrained_change([torch.tensor(change) for change in changes], states)
    assert (up.shape, down.shape) == ((out, 5), (5, width))
    np.testing.assert_allclose(base + (up @ down).numpy(), wanted, rtol=1e-9, atol=1e-9)
    for other in (wanted + 0.01 * rng.normal(size=wanted.shape), base):  # others miss the words
        assert np.abs(c @ other.T - v).max() > 1e-3


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_each_word_keeps_its_keys_and_values_and_captions_change_the_least(family: str, folders: Path) -> None:
    base = load_base(folders / family)
    tokens = len(base.tokenizer)
    first, second = concept(base, "<new1>", "dog", 1), concept(base, "<new2>", "cat", 2)
    merged = merge_concepts([("first", first, 1.0), ("second", second, 0.5)], base, CAPTIONS).adapter
    assert len(base.tokenizer) == tokens
    assert (list(merged.tokens), merged.metadata["trigger"]) == (["<new1>", "<new2>"], "<new1>, <new2>")
    states = concept_states(base, [("first", first), ("second", second)], CAPTIONS)
    count = 2 * len(CONTEXTS)  # each is two tokens
    assert [own.shape[0] for own in states.words] == [count, count]
    for path, (delta,) in merged.deltas.items():
        layer = base.unet.get_submodule(path.removeprefix("unet."))
        shape = tuple(layer.weight.shape)  # type: ignore[arg-type, union-attr]
        assert isinstance(delta, LinearDelta)
        assert delta.leaves["lora_down"].shape == (2 * count, shape[1])
        found = delta.delta(shape).double()
        own = [source.deltas[path][0].leaves["diff"].double() for source in (first, second)]
        for rows, change in ((states.words[0], own[0]), (states.words[1], 0.5 * own[1])):
            torch.testing.assert_close(rows @ found.T, rows @ change.T, rtol=1e-4, atol=1e-4)

        # at the least change of captions, every change that leaves the words alone has a gradient of zero
        gradient = found @ states.gram
        free = torch.linalg.svd(torch.cat([*states.words])).Vh[2 * count :]
        assert len(free) > 0
        assert (gradient @ free.T).abs().max() < 1e-4 * gradient.abs().max()


def test_by_the_command_it_becomes_one_file(folders: Path, tmp_path: Path) -> None:
    folder = folders / "sd1"
    base = load_base(folder)
    files = {}
    for number, noun in ((1, "dog"), (2, "cat")):
        files[concept(base, f"<new{number}>", noun, number).save(tmp_path / f"{noun}.safetensors")] = 1.0
    (tmp_path / "captions.txt").write_text("\n".join(["", *CAPTIONS, " "]), "utf-8")
    both = dg.combine(files, algorithm="concepts", captions=tmp_path / "captions.txt", base=str(folder))
    small = dg.combine(files, algorithm="concepts", captions=tmp_path / "captions.txt", base=str(folder), rank=2)
    assert {delta.leaves["lora_down"].shape[0] for (delta,) in small.deltas.values()} == {2}
    again = load_adapter(both.save(tmp_path / "both.safetensors"))
    prompt = ["a photo of a <new2> cat"]
    values: list[Tensor] = []
    for adapter in (load_adapter(tmp_path / "cat.safetensors"), again):
        with graft(base, {adapter: 1.0}), torch.no_grad():
            layer = base.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v
            values.append(layer(base.condition(prompt).hidden_states))
    torch.testing.assert_close(values[1][:, 5:7], values[0][:, 5:7], rtol=1e-3, atol=1e-4)  # <new2> cat
    assert (values[1][:, 7:] - values[0][:, 7:]).abs().max() > 1e-2


def test_what_cannot_be_merged_is_refused_by_name(folders: Path, tmp_path: Path) -> None:
    base = load_base(folders / "sd1")
    first = concept(base, "<new1>", "dog", 1)

    def merge(*adapters: Adapter, captions: list[str] = CAPTIONS) -> None:
        merge_concepts([(f"adapter {place}", adapter, 1.0) for place, adapter in enumerate(adapters)], base, captions)

    with pytest.raises(DiffgraftError, match=r"The 1 captions have 4 tokens, but 20 or more are needed"):
        merge(first, captions=["a dog"])
    with pytest.raises(DiffgraftError, match="adapter 1 has the word '<new1>', which an earlier adapter has too"):
        merge(first, first)
    plain = replace(first, tokens={})
    with pytest.raises(DiffgraftError, match=r"words have the same states.*trigger=<new2>"):
        merge(plain, plain)
    with pytest.raises(DiffgraftError, match="adapter 1 does not name the trigger"):
        merge(first, replace(plain, metadata={}))
    path = next(iter(first.deltas)).replace("attn2", "attn1")
    other = replace(plain, deltas={path: (FullDelta({"diff": torch.ones(3, 2)}),)})
    with pytest.raises(DiffgraftError, match=r"attn1.*, but concepts are merged in this base's keys and values of"):
        merge(first, other)
    wide = replace(plain, deltas=dict.fromkeys(first.deltas, (FullDelta({"diff": torch.ones(3, 2)}),)))
    with pytest.raises(DiffgraftError, match=r"adapter 1 does not fit unet\..* of this base"):
        merge(first, wide)
    file = first.save(tmp_path / "a.safetensors")
    with pytest.raises(DiffgraftError, match=r"needs the text encoder of the base \(--base\), and a text file"):
        dg.combine({file: 1.0}, algorithm="concepts", base="tiny")
    with pytest.raises(DiffgraftError, match="is not a readable text file of captions"):
        dg.combine({file: 1.0}, algorithm="concepts", base="tiny", captions=tmp_path / "none.txt")
