"""A network that predicts a LoRA from one to five pictures of a subject.

It is a hypernetwork in the sense of Ha et al. 2016, arXiv:1609.09106: a small network that returns the weights of
another. As in HyperDreamBooth (Ruiz et al. 2023, arXiv:2307.06949, sections 4.1 and 4.2), each layer of the denoiser
has two matrices that all subjects share, and only a small matrix between them is predicted:

    ΔW = up · core(pictures) · down,  with up [out, r], core [r, r] and down [r, in].

So the result is a LoRA of rank r. All three are learned together, by the loss of the denoiser.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.factors import FactorDelta, Shape
from diffgraft.adapters.methods.lora import LowRank

_WIDTHS = (32, 64, 96)
"""Widths of the picture encoder at 1, 1/2 and 1/4 of the picture's sides; at 1/8 it is as wide as the decoder"""
_HEADS, _BLOCKS, _GROUPS = 4, 3, 8


class _Residual(nn.Module):
    """Two convolutions with a shortcut, which halve both sides."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(_GROUPS, inputs), nn.GroupNorm(_GROUPS, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        shortcut: Tensor = self.shortcut(x)
        return shortcut + found


class PictureEncoder(nn.Module):
    """Pictures [n, 3, h, w] with values from -1 to 1 → tokens [n, h / 8 · w / 8, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (*_WIDTHS, width)
        self.first = nn.Conv2d(3, widths[0], 3, 1, 1)
        self.blocks = nn.Sequential(*(_Residual(inputs, outputs) for inputs, outputs in pairwise(widths)))

    def forward(self, pictures: Tensor) -> Tensor:
        found: Tensor = self.blocks(self.first(pictures))
        return found.flatten(2).transpose(1, 2)


class WeightPredictor(nn.Module):
    """The whole network, for the layers of one denoiser."""

    def __init__(self, layers: Mapping[str, Sequence[int]], rank: int = 16, width: int = 128, tokens: int = 64) -> None:
        """Create the untrained network; its first LoRA changes nothing.

        Args:
            layers: path of each layer in the denoiser → shape of its weight, [out, in] or [out, in, height, width].
            rank: rank of the LoRA.
            width: width of tokens.
            tokens: number of tokens of a picture.
        """
        super().__init__()
        self.layers: dict[str, Shape] = {path: tuple(shape) for path, shape in layers.items()}
        self.rank, self.width, self.tokens = rank, width, tokens
        self.encoder = PictureEncoder(width)
        self.positions = nn.Parameter(0.5 * torch.randn(tokens, width))
        self.queries = nn.Parameter(0.5 * torch.randn(len(layers), width))
        block = nn.TransformerDecoderLayer(
            width, _HEADS, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(block, _BLOCKS, nn.LayerNorm(width))
        self.head = nn.Linear(width, rank * rank)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.down = nn.ParameterList(_normal((rank, *shape[1:])) for shape in self.layers.values())
        self.up = nn.ParameterList(_normal((shape[0], rank)) for shape in self.layers.values())

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make this network, as a file has them."""
        layers = {path: list(shape) for path, shape in self.layers.items()}
        return {"layers": layers, "rank": self.rank, "width": self.width, "tokens": self.tokens}

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the cores of n subjects, [n, layers, rank, rank].

        Args:
            pictures: k pictures of each subject, [n, k, 3, 64, 64] with values from -1 to 1; their order has no effect.
        """
        count, views = pictures.shape[:2]
        tokens = self.encoder(pictures.flatten(0, 1)) + self.positions
        memory = tokens.reshape(count, views * self.tokens, self.width)
        states = self.decoder(self.queries.expand(count, -1, -1), memory)
        cores: Tensor = self.head(states)
        return cores.view(*cores.shape[:2], self.rank, self.rank)

    @contextmanager
    def acting(self, denoiser: nn.Module, cores: Tensor) -> Iterator[None]:
        """Let a denoiser compute each of n samples with a LoRA of its own within the block.

        Args:
            denoiser: the denoiser, whose weights are not changed.
            cores: result of `forward`, [n, layers, rank, rank], for the n samples of its batches.
        """
        handles = []
        for place, path in enumerate(self.layers):
            core, down, up = cores[:, place], self.down[place], self.up[place]

            def hook(
                module: Any, given: tuple[Tensor, ...], out: Tensor, core: Tensor = core, down: Tensor = down,
                up: Tensor = up,
            ) -> Tensor:  # fmt: skip
                more: Tensor = out + _through(given[0], module, down, core, up)
                return more

            handles.append(denoiser.get_submodule(path).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def adapter(self, cores: Tensor, denoiser: str, metadata: Mapping[str, Any]) -> Adapter:
        """Return the LoRA of one subject as an adapter.

        Args:
            cores: cores of the subject, [layers, rank, rank].
            denoiser: name of the denoiser in paths, such as `Family.denoiser`.
            metadata: metadata of the adapter.
        """
        deltas = {}
        for place, (path, shape) in enumerate(self.layers.items()):
            up = (self.up[place] @ cores[place]).float()
            leaves = {
                "lora_down": self.down[place].detach().float().clone(),
                "lora_up": up.view(*up.shape, *[1] * (len(shape) - 2)),
            }
            deltas[f"{denoiser}.{path}"] = (FactorDelta(LowRank(), leaves, float(self.rank)),)
        return Adapter(deltas, metadata)


def _normal(shape: Sequence[int]) -> Tensor:
    """Return random values with the variance of one over the number of inputs."""
    value: Tensor = torch.randn(*shape)
    return value.div_(value[0].numel() ** 0.5)


def _through(x: Tensor, layer: Any, down: Tensor, core: Tensor, up: Tensor) -> Tensor:
    """Return up · core · down · x for inputs [n, …] of a linear layer or a convolution, with a core [n, r, r] each."""
    inner: Tensor
    if isinstance(layer, nn.Conv2d):
        inner = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
        mixed = torch.bmm(core.to(inner.dtype), inner.flatten(2)).view_as(inner)
        outer: Tensor = F.conv2d(mixed, up[..., None, None])
        return outer
    inner = F.linear(x, down)
    mixed = torch.bmm(inner.reshape(len(x), -1, inner.shape[-1]), core.to(inner.dtype).transpose(1, 2))
    return F.linear(mixed.view_as(inner), up)
