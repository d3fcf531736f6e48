"""Text embeddings of frozen text encoders, computed once for each prompt and cached."""

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
    """A cache of the conditioning of prompts, without micro-conditioning, for frozen text encoders.

    It is in main memory, as those of many prompts take more than a text encoder.
    """

    def __init__(self, base: Base, *, whole: bool = False, keep: bool = False, limit: int = 4096) -> None:
        """Create an empty cache.

        Args:
            base: base whose text encoders are used.
            whole: whether long prompts are encoded in chunks instead of being truncated.
            keep: whether `prepare` also reads and writes files of the cache on disk.
            limit: number of prompts that are held in memory at most.
        """
        self._base, self._whole, self._keep, self._limit = base, whole, keep, limit
        self._cached: OrderedDict[str, Conditioning] = OrderedDict()

    def prepare(self, prompts: Iterable[str]) -> None:
        """Encode prompts, or read them from the cache on disk, so that later calls do not need the text encoders."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cached]
        self._limit = max(self._limit, len(self._cached) + len(missing))
        for prompt in track(missing, "encoding prompts", min_items=2):
            conditioning = _read(self._file(prompt)) if self._keep else None
            if conditioning is None:
                conditioning = self._encode(prompt)
                if self._keep:
                    tensors = {_STATES: conditioning.hidden_states, **conditioning.added}
                    write_tensors(self._file(prompt), tensors, prompt)
            self._cached[prompt] = conditioning

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of n prompts; those of fewer chunks are padded with chunks of the empty prompt."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._cached:
                self._cached[prompt] = self._encode(prompt)
            self._cached.move_to_end(prompt)
        parts = [self._cached[prompt] for prompt in prompts]
        while len(self._cached) > self._limit:
            self._cached.popitem(last=False)
        longest = max(part.hidden_states.shape[1] for part in parts)
        if any(part.hidden_states.shape[1] < longest for part in parts):
            parts = [_padded(part, self._empty(), longest) for part in parts]
        added = {name: torch.cat([part.added[name] for part in parts]) for name in parts[0].added}
        found = Conditioning(torch.cat([part.hidden_states for part in parts]), added)
        return _to(found, self._base.device) if self._base.device.type != "meta" else found

    def _empty(self) -> Tensor:
        if "" not in self._cached:
            self._cached[""] = self._encode("")
        return self._cached[""].hidden_states

    @torch.no_grad()
    def _encode(self, prompt: str) -> Conditioning:
        found = self._base.family.encode(self._base, [prompt], self._whole)
        return _to(found, torch.device("cpu")) if self._base.device.type != "meta" else found

    def _file(self, prompt: str) -> Path:
        base = self._base
        encoders = [repr(part.dtype) for part in base.prompt_networks().values()]
        key = f"{_VERSION} {base.hash}{base.under} {base.quantize} {encoders} {base.device.type} {self._whole} {prompt}"
        name = hashlib.sha256(key.encode()).hexdigest()
        return cache_folder() / "texts" / name[:2] / f"{name}.safetensors"


def _padded(conditioning: Conditioning, empty: Tensor, length: int) -> Conditioning:
    """Append hidden states of the empty prompt, [1, tokens, width], up to `length` tokens."""
    missing = (length - conditioning.hidden_states.shape[1]) // empty.shape[1]
    return Conditioning(torch.cat([conditioning.hidden_states, *[empty] * missing], 1), conditioning.added)


def _to(conditioning: Conditioning, device: torch.device) -> Conditioning:
    added = {name: value.to(device) for name, value in conditioning.added.items()}
    return Conditioning(conditioning.hidden_states.to(device), added)


def _read(file: Path) -> Conditioning | None:
    """Read a conditioning from a file of the cache; None if the file does not exist or is damaged."""
    tensors = read_tensors(file)
    if tensors is None or _STATES not in tensors:
        return None
    return Conditioning(tensors.pop(_STATES), tensors)
