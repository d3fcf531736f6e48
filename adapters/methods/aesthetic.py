"""Aesthetic gradients: a text encoder that is tuned for each prompt, towards pictures that somebody likes.

Gallego 2022, arXiv:2209.12330, section 2. The file holds e, the mean of the pictures' CLIP embeddings, and no change of
weights. When a prompt is encoded, some steps of Adam on all weights of the text encoder lower

    loss = − cos(P · pooled(prompt), e)

where P is the projection of CLIP's text model, which Stable Diffusion's text encoder lacks, and which the file holds as
well. The prompt is encoded with the tuned weights; those of the base do not change. Steps, learning rate and blending
are those of AUTOMATIC1111/stable-diffusion-webui-aesthetic-gradients, ``aesthetic_clip.py``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from diffgraft.adapters.adapter import Network
from diffgraft.bases.quantized import Quantized
from diffgraft.errors import one_line
from diffgraft.strict import Strict

_LEGACY_END = 2
"""`eos_token_id` in configurations of older CLIPs, whose end token is the one with the largest id"""
_IS_PAUSED = ContextVar("aesthetic_embeddings_are_paused", default=False)


class AestheticOptions(Strict):
    """How text encoders are tuned; the defaults are those of webui's extension."""

    steps: int = Field(5, ge=0, le=1000)
    """Number of steps of Adam"""
    learning_rate: float = Field(1e-4, gt=0, le=1)
    """Learning rate of Adam"""


@contextmanager
def without_tuning() -> Iterator[None]:
    """Within the block text encoders are used as they are: for negative prompts, and while one is tuned."""
    token = _IS_PAUSED.set(True)
    try:
        yield
    finally:
        _IS_PAUSED.reset(token)


@dataclass(frozen=True, eq=False, repr=False)
class AestheticEmbedding(Network):
    """Mean CLIP embedding of pictures that somebody liked, and the projection that texts are compared with it by."""

    tensors: Mapping[str, Tensor]
    """``embedding`` [1, d], and ``projection`` [d, width of the text encoder] if the file has one"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values of `AestheticOptions`"""

    kind = "aesthetic"
    acts_on = "text_encoder"

    def hook(self, parts: Mapping[str, nn.Module], strength: float) -> Callable[[], None]:
        """Tune the text encoder for each prompt, until the returned function is called.

        With several text encoders it is the first, and `strength` blends the hidden states: 0 is those of the base, and
        1 those of the tuned text encoder.
        """
        if "projection" not in self.tensors:
            raise ValueError(
                "it is an aesthetic embedding, which needs the projection of CLIP's text encoder; Stable Diffusion "
                "does not include it. Add it: diffgraft aesthetic FILE --clip CLIP --output NEW.safetensors"
            )
        encoder, width = parts.get("text_encoder"), self.tensors["projection"].shape[1]
        own = getattr(getattr(encoder, "config", None), "hidden_size", None)
        if encoder is None or own != width or "clip" not in type(encoder).__name__.lower():
            kind = "no text encoder" if encoder is None else f"a {type(encoder).__name__} of width {own}"
            raise ValueError(f"it is for CLIP text encoders of width {width}, but this base has {kind}")
        if any(isinstance(module, Quantized) for module in encoder.modules()):
            raise ValueError("it tunes the text encoder, whose weights are quantized: load the base with quantize=none")
        return encoder.register_forward_hook(TunedPerPrompt(self, strength), with_kwargs=True).remove


class TunedPerPrompt:
    """Forward hook of a text encoder, which encodes each prompt with weights that are tuned for it."""

    def __init__(self, network: AestheticEmbedding, strength: float) -> None:
        self._network, self._strength = network, strength
        self._options = AestheticOptions.model_validate(dict(network.settings))

    def __call__(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the encoder's `output` with the hidden states of each prompt blended with the tuned ones."""
        if _IS_PAUSED.get():
            return output
        given = {**kwargs, "input_ids": args[0] if args else kwargs["input_ids"]}
        with without_tuning():
            rows = [
                self._tuned(encoder, {name: _row(value, row) for name, value in given.items()}, end)
                if end > 1  # else the prompt is empty
                else None
                for row, end in enumerate(end_positions(encoder, given["input_ids"]))
            ]
        return type(output)(**{name: self._blended(value, name, rows) for name, value in output.items()})

    @torch.inference_mode(False)
    def _tuned(self, encoder: nn.Module, inputs: Mapping[str, Any], end: int) -> Any:
        """Return the output of the tuned encoder for one prompt, `inputs` of one row, with its end token at `end`."""
        device = inputs["input_ids"].device
        weights = {name: value.detach().float().clone().requires_grad_() for name, value in encoder.named_parameters()}
        wanted = F.normalize(self._network.tensors["embedding"].to(device).float(), dim=-1)
        projection = self._network.tensors["projection"].to(device).float()
        optimizer = torch.optim.Adam([*weights.values()], self._options.learning_rate)
        with torch.enable_grad():
            for _ in range(self._options.steps):
                state = functional_call(encoder, weights, (), {**inputs}).last_hidden_state[:, end]
                loss = -(F.normalize(state @ projection.T, dim=-1) * wanted).sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            return functional_call(encoder, weights, (), {**inputs})

    def _blended(self, value: Any, name: str, rows: Sequence[Any]) -> Any:
        """Return an entry of the encoder's output, a tensor or a tuple of them, blended with those of tuned rows."""
        if isinstance(value, tuple):
            return tuple(
                self._blend(own, [row and row[name][place] for row in rows]) for place, own in enumerate(value)
            )
        return self._blend(value, [row and row[name] for row in rows]) if isinstance(value, Tensor) else value

    def _blend(self, own: Tensor, tuned: Sequence[Tensor | None]) -> Tensor:
        """Return own + strength · (tuned − own), row by row; rows without a tuned one, [1, …], stay as they are."""
        blended = own.clone()
        for row, other in enumerate(tuned):
            if other is not None:
                blended[row] = torch.lerp(own[row].float(), other[0].float(), self._strength).to(own.dtype)
        return blended


def _row(value: Any, row: int) -> Any:
    """Return one row of a tensor [n, …] as a tensor [1, …]; other inputs of an encoder are returned as they are."""
    return value[row : row + 1].clone() if isinstance(value, Tensor) else value


def end_positions(encoder: Any, ids: Tensor) -> list[int]:
    """Return the position of the end token of each prompt in token ids [n, tokens], as transformers finds it."""
    config = encoder.config
    own = ids.where(ids < config.vocab_size, 0)  # words of adapters have ids beyond the end token's
    is_end = own == (own.amax(-1, keepdim=True) if config.eos_token_id == _LEGACY_END else config.eos_token_id)
    positions: list[int] = is_end.int().argmax(-1).tolist()
    return positions


def read_network(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Network:
    """Build the embedding from its tensors. Raises ValueError if they do not fit together."""
    embedding, projection = tensors.get("embedding"), tensors.get("projection")
    if embedding is None or embedding.ndim not in (1, 2) or embedding.shape[:-1].numel() != 1:
        raise ValueError("expected an aesthetic embedding, which is a single row of numbers")
    if unknown := tensors.keys() - {"embedding", "projection"}:
        raise ValueError(f"an aesthetic embedding has no tensor {min(unknown)}")
    kept = {"embedding": embedding.view(1, -1)}
    if projection is not None:
        if projection.ndim != 2 or len(projection) != embedding.shape[-1]:
            shape = " × ".join(map(str, projection.shape))
            raise ValueError(f"its projection is {shape}, expected {embedding.shape[-1]} rows, one for each number")
        kept["projection"] = projection
    try:
        AestheticOptions.model_validate(dict(settings))
    except ValidationError as error:
        raise ValueError(f"its settings are invalid: {one_line(error)}") from error
    return AestheticEmbedding(kept, dict(settings))


NETWORKS = {"aesthetic": read_network}
