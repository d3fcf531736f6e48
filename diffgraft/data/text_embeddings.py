"""What a frozen text encoder says of prompts, computed once and kept."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffgraft.bases import Base, Conditioning
from diffgraft.data.cache import read_tensors, write_tensors
from diffgraft.files import cache_folder
from diffgraft.progress import track

_VERSION = "texts 1"
_STATES = "hidden_states"


class TextEmbeddingCache:
    """The conditioning of prompts, without framing, by text encoders that do not change."""

    def __init__(self, base: Base, *, whole: bool = False, keep: bool = False, limit: int = 4096) -> None:
        """`whole` prompts are read in pieces; if `keep`, what `prepare` computes also goes to files of the cache.

        At most `limit` prompts are held in memory.
        """
        self._base, self._whole, self._keep, self._limit = base, whole, keep, limit
        self._held: OrderedDict[str, Conditioning] = OrderedDict()

    def prepare(self, prompts: Iterable[str]) -> None:
        """Compute, or read from the cache, what these say: the text encoders are not asked for them again."""
        wanted = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._held]
        self._limit = max(self._limit, len(self._held) + len(wanted))
        for prompt in track(wanted, "encoding prompts", min_items=2):
            found = _read(self._file(prompt)) if self._keep else None
            if found is None:
                found = self._ask(prompt)
                if self._keep:
                    write_tensors(self._file(prompt), {_STATES: found.hidden_states, **found.added}, prompt)
            self._held[prompt] = _to(found, self._base.device)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Of n prompts; those of fewer pieces are filled up with empty ones."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._held:
                self._held[prompt] = self._ask(prompt)
            self._held.move_to_end(prompt)
        kept = [self._held[prompt] for prompt in prompts]
        while len(self._held) > self._limit:
            self._held.popitem(last=False)
        longest = max(one.hidden_states.shape[1] for one in kept)
        if any(one.hidden_states.shape[1] < longest for one in kept):
            kept = [_filled(one, self._empty(), longest) for one in kept]
        added = {name: torch.cat([one.added[name] for one in kept]) for name in kept[0].added}
        return Conditioning(torch.cat([one.hidden_states for one in kept]), added)

    def _empty(self) -> Tensor:
        if "" not in self._held:
            self._held[""] = self._ask("")
        return self._held[""].hidden_states

    @torch.no_grad()
    def _ask(self, prompt: str) -> Conditioning:
        return self._base.family.encode(self._base, [prompt], self._whole)

    def _file(self, prompt: str) -> Path:
        base = self._base
        encoders = [repr(part.dtype) for part in base.text_encoders().values()]
        said = f"{_VERSION} {base.hash} {base.quantize} {encoders} {base.device.type} {self._whole} {prompt}"
        name = hashlib.sha256(said.encode()).hexdigest()
        return cache_folder() / "texts" / name[:2] / f"{name}.safetensors"


def _filled(one: Conditioning, empty: Tensor, longest: int) -> Conditioning:
    missing = (longest - one.hidden_states.shape[1]) // empty.shape[1]
    return Conditioning(torch.cat([one.hidden_states, *[empty] * missing], 1), one.added)


def _to(one: Conditioning, device: torch.device) -> Conditioning:
    added = {name: value.to(device) for name, value in one.added.items()}
    return Conditioning(one.hidden_states.to(device), added)


def _read(file: Path) -> Conditioning | None:
    """What a file of the cache holds; None where there is none, or it is damaged."""
    tensors = read_tensors(file)
    if tensors is None or _STATES not in tensors:
        return None
    return Conditioning(tensors.pop(_STATES), tensors)
