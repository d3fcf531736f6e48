"""Merging of concepts: one adapter that does to the words of each concept what its own adapter does to them.

Kumari et al. 2023 (arXiv:2212.04488), section 3.2 and its appendix: for each projection of the text to keys or values,
with the states C_reg [t, d] of captions, C [s, d] of the words of all concepts, and V [s, out] of what their own
adapters make of C,

    Ŵ = argmin ‖(W − W₀) C_regᵀ‖   such that   W Cᵀ = Vᵀ
      = W₀ + Rᵀ (C G⁻¹ Cᵀ)⁻¹ C G⁻¹,   G = C_regᵀ C_reg,   R = V − C W₀ᵀ

by Lagrange multipliers. As V = C_n (W₀ + ΔW_n)ᵀ for the words of concept n, its rows of R are C_n ΔW_nᵀ: the base's
weights are not needed. The change Ŵ − W₀ has the rank s of the constraints, and is written as a LoRA of that rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.factors import Shape
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.ops.combine import combined_metadata
from diffgraft.adapters.ops.effect import WeightedDeltas, total_delta
from diffgraft.adapters.ops.resize import ReducedAdapter, resize
from diffgraft.adapters.patch import weight_shape
from diffgraft.adapters.strengths import Strength, strengths_of
from diffgraft.adapters.words import AddedTokens
from diffgraft.bases import Base, load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError
from diffgraft.progress import track

CONTEXTS = ("{}", "a {}", "a photo of a {}")
"""Beginnings of prompts in which the words of a concept keep their keys and values; what follows does not change the
states of a causal text encoder"""
_BATCH = 16
_RIDGE = 1e-8
"""Share of the mean of G's eigenvalues that is added to each of them"""


@dataclass(frozen=True)
class ConceptStates:
    """Hidden states of a base's text encoders, from which concepts are merged; in float64."""

    words: Sequence[Tensor]
    """States [s_n, d] of the words of each concept, in the order of the adapters"""
    gram: Tensor
    """G = C_regᵀ C_reg [d, d] of the states C_reg [t, d] of captions; positive definite"""


def merge_concepts(
    adapters: Sequence[tuple[str, Adapter, Strength]],
    base: Base,
    captions: Sequence[str],
    size: RankBudget | None = None,
    weights: Weights | None = None,
) -> ReducedAdapter:
    """Build one adapter of LoRAs that has the concepts of all `adapters`, each under its own words.

    Args:
        adapters: name for messages, adapter, and its strength, or strengths by part or block. They change keys and
            values of cross-attention alone, as those of the method `custom` do.
        base: base whose text encoders are used; it is the same afterwards.
        captions: captions of pictures that are to stay the same.
        size: size of each module's LoRA; without it, the number of the words' tokens in `CONTEXTS`, which is exact.
        weights: weights of the base, which methods that are functions of them need.

    Raises:
        DiffgraftError: an adapter changes other layers or names no trigger, two have the same word, or there are too
            few captions.
    """
    inputs = [(name, adapter, strengths_of(name, strength)) for name, adapter, strength in adapters]
    shapes = {path: shape for name, adapter, _ in inputs for path, shape in _shapes(name, adapter, base).items()}
    combined = combined_metadata(inputs)
    states = concept_states(base, [(name, adapter) for name, adapter, _ in inputs], captions)
    deltas: dict[str, tuple[Delta, ...]] = {}
    for path in track(sorted(shapes), "modules", min_items=20):
        changes = []
        for _, adapter, strengths in inputs:
            steps: WeightedDeltas = [(delta, strengths.at(path)) for delta in adapter.deltas.get(path, ())]
            changes.append(total_delta(path, steps, shapes[path], weights))
        up, down = constrained_change(changes, states)
        deltas[path] = (low_rank(down.float(), up.float()),)
    metadata = {**combined.metadata, "method": "pivotal" if combined.tokens else "lora"}
    merged = Adapter(deltas, metadata, combined.networks, combined.tokens)
    return ReducedAdapter(merged, {}) if size is None else resize(merged, size)


def open_text(base: str | None, captions: str | Path | None) -> tuple[Base, list[str]]:
    """Load what `merge_concepts` needs: a base, and the captions in a text file, one a line.

    Raises:
        DiffgraftError: one of the two is missing or cannot be read.
    """
    if base is None or captions is None:
        raise DiffgraftError(
            "Merging concepts needs the text encoder of the base (--base), and a text file with captions of pictures "
            "that are to stay the same, one a line (--captions)."
        )
    try:
        lines = Path(captions).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DiffgraftError(f"{captions} is not a readable text file of captions, one a line ({error}).") from error
    return load_base(base), [line.strip() for line in lines if line.strip()]


def constrained_change(changes: Sequence[Tensor], states: ConceptStates) -> tuple[Tensor, Tensor]:
    """Factor the merged change of one weight as up [out, s] · down [s, d].

    Args:
        changes: change ΔW_n [out, d] that each concept's own adapter makes.
        states: states of the concepts' words and of the captions.
    """
    words = torch.cat([*states.words])
    targets = torch.cat([own @ change.double().T for own, change in zip(states.words, changes, strict=True)])
    down = torch.linalg.solve(states.gram, words.T).T
    # Cholesky's factor of C G⁻¹ Cᵀ, half to each side, so that neither is too large or small for a file's float32
    half, failed = torch.linalg.cholesky_ex(down @ words.T)
    if failed:
        raise DiffgraftError(
            "The concepts cannot be merged, as their words have the same states, or states that depend on one another: "
            "train them with different triggers, as trigger=<new2>."
        )
    up, down = (torch.linalg.solve_triangular(half, value, upper=False) for value in (targets, down))
    return up.T, down


@torch.no_grad()
def concept_states(base: Base, adapters: Sequence[tuple[str, Adapter]], captions: Sequence[str]) -> ConceptStates:
    """Compute the states of each adapter's trigger and class, in `CONTEXTS`, and of all tokens of `captions`.

    Raises:
        DiffgraftError: an adapter names no trigger, or the captions have fewer tokens than the width of states.
    """
    phrases = [_phrase(name, adapter) for name, adapter in adapters]
    added = AddedTokens(base, {word: vectors for _, adapter in adapters for word, vectors in adapter.tokens.items()})
    try:
        words = [torch.cat([_last_words(base, context, phrase) for context in CONTEXTS]) for phrase in phrases]
        count, gram = 0, torch.zeros(words[0].shape[1], words[0].shape[1], dtype=torch.float64, device=words[0].device)
        for start in track(range(0, len(captions), _BATCH), "captions", min_items=20):
            states, is_token, _ = _encode(base, captions[start : start + _BATCH])
            gram += states[is_token].T @ states[is_token]
            count += int(is_token.sum())
    finally:
        added.remove()
    width = len(gram)
    if count < width:
        raise DiffgraftError(
            f"The {len(captions)} captions have {count} tokens, but {width} or more are needed, the width of this "
            "base's text states: give more captions (the paper has a thousand)."
        )
    # a normalization can keep all states in a subspace, outside of which changes would cost nothing
    ridge = _RIDGE * gram.trace() / width * torch.eye(width, dtype=gram.dtype, device=gram.device)
    return ConceptStates(words, gram + ridge)


def _shapes(name: str, adapter: Adapter, base: Base) -> dict[str, Shape]:
    """Shapes of the weights that an adapter changes, by path.

    Raises:
        DiffgraftError: one is none of the base's keys and values that are computed from text, or has another shape.
    """
    part = base.family.denoiser
    layers = {
        f"{part}.{path}": base.denoiser.get_submodule(path)
        for path in choose_layers(part, base.denoiser, "context", base.family)
    }
    for path, deltas in adapter.deltas.items():
        if path not in layers:
            raise DiffgraftError(
                f"{name} changes {path}, but concepts are merged in this base's keys and values of cross-attention: "
                "train it with method=custom, or with layers=context, or choose another algorithm."
            )
        if not all(delta.fits(weight_shape(layers[path])) for delta in deltas):
            raise DiffgraftError(f"{name} does not fit {path} of this base: name the base that it is for (--base).")
    return {path: weight_shape(layers[path]) for path in adapter.deltas}


def _phrase(name: str, adapter: Adapter) -> str:
    """The words of an adapter's concept: its trigger and its class, such as ``<new1> dog``."""
    trigger = str(adapter.metadata.get("trigger") or "")
    if not trigger:
        raise DiffgraftError(f"{name} does not name the trigger of its concept, so its words cannot be kept apart.")
    return f"{trigger} {adapter.metadata.get('class') or ''}".strip()


def _last_words(base: Base, context: str, phrase: str) -> Tensor:
    """States [s, d] of the tokens of `phrase` at the end of a prompt."""
    _, _, alone = _encode(base, [phrase])
    states, _, is_word = _encode(base, [context.format(phrase)])
    return states[is_word][-int(alone.sum()) :]


def _encode(base: Base, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """States [n, tokens, d] in float64, which of them are no padding [n, tokens], and which are words [n, tokens]."""
    states = base.condition(prompts).hidden_states
    tokenizer = getattr(base, base.family.text[0].tokenizer)
    encoded = tokenizer(
        [*prompts],
        padding="max_length",
        max_length=states.shape[1],
        truncation=True,
        return_special_tokens_mask=True,
        return_tensors="pt",
    )
    return states.double(), encoded.attention_mask.bool(), encoded.special_tokens_mask == 0
