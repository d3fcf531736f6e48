"""Edits by attention control (prompt-to-prompt): a picture is drawn again with other words, and keeps its composition.

Hertz et al. 2022, arXiv:2208.01626. Source and edited picture are drawn side by side from the same noise. In the first
steps the edited picture takes the source's attention maps: those of cross-attention for the tokens that both prompts
have, or that were exchanged, and those of self-attention. Tokens of the edited prompt may also be weighted.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.generation.checks import check_fields
from diffgraft.generation.grammar.attention import read_weights
from diffgraft.generation.grammar.chunks import chunks_of
from diffgraft.generation.grammar.composition import split_parts
from diffgraft.generation.grammar.schedule import schedule_of
from diffgraft.generation.grammar.tags import split_tags
from diffgraft.generation.image_input import ImageInput
from diffgraft.generation.metadata import RECORD, DrawingRecord, EditRecord, told_by
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings

_CHOICE = re.compile(r"(?<!\\)\{")
"""Beginning of a choice in a prompt, such as {a|b}"""
_MOST_PLACES = 16 * 16
"""Places of a layer up to which self-attention is taken over: finer maps hold details, and not composition"""


@dataclass(frozen=True)
class Edit:
    """How much of the source an edited picture keeps."""

    cross: float = 0.8
    """Share of the steps in which maps of cross-attention are taken over; 0: none"""
    self: float = 0.4
    """Share of the steps in which maps of self-attention are taken over; 0: none"""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Word of the edited prompt → factor on the attention to its tokens; negative ones push away from it"""

    def __post_init__(self) -> None:
        """Raise DiffgraftError for shares that are none."""
        check_fields(self, ("cross", "self", "weights"))
        for name, share in (("cross", self.cross), ("self", self.self)):
            if not 0 <= share <= 1:
                raise DiffgraftError(f"Invalid value {name}={share:g}: must be from 0 to 1.")
        for word, factor in self.weights.items():
            if not math.isfinite(factor):
                raise DiffgraftError(f"Invalid weight {factor:g} of {word!r}: must be a finite number.")


def edit(
    session: Session,
    source: str,
    edited: str,
    seed: int = 0,
    change: Edit | None = None,
    settings: DrawSettings | None = None,
    image: ImageInput | None = None,
) -> tuple[Image.Image, Image.Image]:
    """Draw a prompt and an edited one side by side.

    Args:
        session: session that draws, of a base with a UNet.
        source: prompt of the picture to edit.
        edited: prompt with words exchanged (as many tokens as in `source`) or added.
        seed: seed of both.
        change: shares of the steps in which the source's attention maps are kept, and weights of words.
        settings: how they are drawn.
        image: picture that both start from; None: noise.

    Returns:
        The picture of the source prompt, and the edited one.

    Raises:
        DiffgraftError: the base's attention cannot be controlled, a word of `weights` is not in the prompt, or a prompt
            is longer than the text encoder reads at once.
    """
    change, settings = change or Edit(), settings or DrawSettings()
    if settings.regions:
        raise DiffgraftError("A picture with regions cannot be edited: leave them out.")
    settings = replace(settings, batch=2)
    one_chunk(session.base, settings.negative)
    control = control_of(session.base, source, edited, change, settings.steps)
    with controlled(session.base.denoiser, control):
        first, second = session.draw_each([source, edited], [seed, seed], settings, image, on_step=control.advance)
    for picture in (first, second):
        record = DrawingRecord.from_json(picture.info[RECORD])
        picture.info = told_by(replace(record, edit=record_of(change)))
    return first, second


def record_of(change: Edit, inner: int | None = None) -> EditRecord:
    """Return the record of an edit; `inner` is that of `invert` if it starts from an inverted picture."""
    return EditRecord(change.cross, change.self, dict(change.weights), inner)


def control_of(base: Base, source: str, edited: str, change: Edit, steps: int) -> "Control":
    """Return the control for two prompts.

    Raises:
        DiffgraftError: a prompt is too long, or a word to weigh is not in the edited one.
    """
    tokenizer = next(iter(base.tokenizers().values()))
    tags = [[tag for tag in split_tags(prompt)[1] if tag.kind == "hypernet"] for prompt in (source, edited)]
    if tags[0] != tags[1]:
        raise DiffgraftError("Source and edited prompt must name the same hypernetworks, to be drawn side by side.")
    source, edited = (split_tags(prompt)[0] for prompt in (source, edited))
    for prompt in (source, edited):
        if len(split_parts(prompt)) > 1 or len(schedule_of(prompt, steps)) > 1 or _CHOICE.search(prompt):
            raise DiffgraftError(
                f"The prompt {prompt!r} has parts, choices or changes between steps, which edits do not support: "
                "remove them."
            )
    ids = [one_chunk(base, prompt) for prompt in (source, edited)]
    return Control(change, steps, token_map(*ids), token_weights(tokenizer, edited, ids[1], change.weights))


def one_chunk(base: Base, prompt: str) -> list[int]:
    """Return the token ids of a prompt, with those of start and end.

    Raises:
        DiffgraftError: it is longer than the text encoder reads at once.
    """
    tokenizer = next(iter(base.tokenizers().values()))
    chunks = chunks_of(tokenizer, read_weights(prompt, "webui"), "webui")
    if len(chunks) != 1:
        raise DiffgraftError(f"The prompt {prompt!r} is too long to be edited: it has more than one chunk of tokens.")
    return list(chunks[0].padded(tokenizer)[0])


def token_map(source: Sequence[int], edited: Sequence[int]) -> Tensor:
    """Return how attention to the tokens of a prompt becomes that of another: [source, edited], columns of sum 1 or 0.

    Tokens that both have are mapped onto each other. Exchanged ones are, too, if the prompts have as many tokens
    (exchange of words); otherwise they are new, with a column of 0 (refinement).
    """
    end = [len(ids) - next(i for i, v in enumerate(reversed(ids)) if v != ids[-1]) for ids in (source, edited)]
    is_exchange = end[0] == end[1]
    mapped = torch.zeros(len(source), len(edited))
    matcher = SequenceMatcher(None, source[: end[0]], edited[: end[1]], autojunk=False)
    for kind, low, high, first, last in matcher.get_opcodes():
        if kind == "equal" or (kind == "replace" and is_exchange):
            for place in range(first, last):
                share = (place - first) * (high - low) // max(1, last - first)
                mapped[low + share, place] = 1
    for place in range(end[1], len(edited)):  # padding
        mapped[min(end[0] + place - end[1], len(source) - 1), place] = 1
    return mapped


def token_weights(tokenizer: Any, prompt: str, ids: Sequence[int], weights: Mapping[str, float]) -> Tensor:
    """Return a factor for each token of a prompt, [tokens].

    Raises:
        DiffgraftError: a word is not in the prompt.
    """
    factors = torch.ones(len(ids))
    for word, factor in weights.items():
        wanted = tokenizer(word, add_special_tokens=False).input_ids
        places = [at for at in range(len(ids)) if list(ids[at : at + len(wanted)]) == list(wanted)]
        if not wanted or not places:
            raise DiffgraftError(f"The prompt has no {word!r} to weigh: {did_you_mean(word, prompt.split())}")
        for at in places:
            factors[at : at + len(wanted)] = factor
    return factors


class Control:
    """The attention maps of the edited picture: rows of the batch are source and edited picture, in turn."""

    def __init__(self, change: Edit, steps: int, mapped: Tensor, weights: Tensor) -> None:
        """Begin with the first step.

        Args:
            change: how much of the source is kept.
            steps: number of steps.
            mapped: result of `token_map`, [source tokens, edited tokens].
            weights: result of `token_weights`, [edited tokens].
        """
        self._change, self._steps, self._step = change, steps, 0
        self._mapped, self._known, self._weights = mapped, mapped.sum(0), weights

    def advance(self, step: int) -> None:
        """Record how many sampling steps are done, which decides whether attention maps are still changed."""
        self._step = step

    def changed(self, maps: Tensor, is_cross: bool) -> Tensor:
        """Return the maps [rows, heads, places, tokens] of a layer with those of the edited picture changed.

        The rows are those of the source, then as many of the edited picture; the first of each is for its prompt, and
        the other one, with guidance, for the negative prompt, which stays.
        """
        half = len(maps) // 2
        source, own = maps[0], maps[half]
        if is_cross:
            if self._step < self._change.cross * self._steps:
                known = self._known.to(own)
                own = source @ self._mapped.to(own) + own * (1 - known)
            own = own * self._weights.to(own)
        elif self._step < self._change.self * self._steps and own.shape[-1] <= _MOST_PLACES:
            own = source
        changed = maps.clone()
        changed[half] = own
        return changed


@contextmanager
def controlled(denoiser: Any, control: Control) -> Iterator[None]:
    """Let a UNet of diffusers compute its attention with changed maps within the block.

    Raises:
        DiffgraftError: the denoiser has no attention of this kind.
    """
    held = getattr(denoiser, "attn_processors", None)
    if not held or not hasattr(denoiser, "down_blocks"):
        raise DiffgraftError(f"The attention of a {type(denoiser).__name__} cannot be controlled: it is no UNet.")
    denoiser.set_attn_processor(_Controlled(control))
    try:
        yield
    finally:
        denoiser.set_attn_processor(dict(held))


class _Controlled:
    """Attention of diffusers' UNets with its maps in reach; otherwise as diffusers' ``AttnProcessor``."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        residual, shape = hidden_states, hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).mT
        is_cross = encoder_hidden_states is not None
        context = encoder_hidden_states if encoder_hidden_states is not None else hidden_states
        if is_cross and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.mT).mT
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (attn.head_to_batch_dim(part) for part in (query, key, value))
        maps = attn.get_attention_scores(query, key, attention_mask)
        by_row = maps.view(-1, attn.heads, *maps.shape[1:])
        maps = self._control.changed(by_row, is_cross).flatten(0, 1)
        out = attn.batch_to_head_dim(torch.bmm(maps, value))
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.mT.reshape(shape)
        if attn.residual_connection:
            out = out + residual
        result: Tensor = out / attn.rescale_output_factor
        return result
