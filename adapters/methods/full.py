"""Full fine-tuning, as DreamBooth was published (Ruiz et al. 2022, arXiv:2208.12242): every weight of a part trains.

What trains is a copy: the base's own tensors are laid aside and come back on detaching. What is kept is the difference,
whole, or reduced to LoRA by a truncated singular value decomposition (Eckart and Young 1936), of a rank or of as many
ranks as hold a share of each difference's energy.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter, Delta, LinearDelta
from diffgraft.adapters.lowrank import RankBudget, nearest
from diffgraft.adapters.method import Attached, Method, Options, Spec, refuse, strip_text_model
from diffgraft.adapters.projections import same_layer
from diffgraft.bases.layers import is_embedding, parts_of
from diffgraft.errors import DiffgraftError

NAMES = {"weight": "diff", "bias": "diff_b"}
"""Name of a module's parameter → that of its difference in files (LyCORIS, ``lycoris/modules/full.py``)."""


@dataclass(frozen=True, repr=False)
class FullDelta(LinearDelta):
    """The difference of a weight and, where there is one, of a bias."""

    leaves: Mapping[str, Tensor]
    """``diff`` in the shape of the weight, ``diff_b`` in that of the bias; either may be missing"""

    kind = "full"
    alpha = None

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        return tuple(self.leaves["diff"].shape) if "diff" in self.leaves else None

    def delta(self, weight_shape: tuple[int, ...]) -> Tensor:
        if "diff" not in self.leaves:
            return torch.zeros(weight_shape)
        return self.leaves["diff"].float().view(weight_shape)

    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        weight, _ = super().apply(weight, None, strength)
        if bias is not None and "diff_b" in self.leaves:
            bias = bias.float() + strength * self.leaves["diff_b"].float().to(bias.device)
        return weight, bias

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        bias_fits = "diff_b" not in self.leaves or self.leaves["diff_b"].shape == weight_shape[:1]
        return bias_fits and ("diff" not in self.leaves or same_layer(tuple(self.leaves["diff"].shape), weight_shape))


class FullOptions(Options):
    """How the difference is kept."""

    rank: int | None = Field(None, ge=1)
    """Reduce each layer's difference to a LoRA of this rank; changes of biases, norms and embeddings are dropped"""
    energy: float | None = Field(None, gt=0, lt=1)
    """Reduce it to the least rank that holds this share of its squared norm"""


class AttachedFull(Attached):
    """Trainable copies in the places of a part's parameters."""

    def __init__(self, target: Any, spec: Spec) -> None:
        super().__init__()
        self._options: FullOptions = spec.options
        self._places: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
        self._copies: dict[str, nn.Parameter] = {}
        parts = parts_of(target)
        if any(not value.is_floating_point() for part in spec.paths for value in parts[part].parameters()):
            raise DiffgraftError(
                "The method 'full' trains the base's own weights, and here they are quantised: leave quantize at none, "
                "or take another method."
            )
        for part in spec.paths:
            for path, module in parts[part].named_modules():
                for name, kept in list(module.named_parameters(recurse=False)):
                    full = ".".join(word for word in (part, path, name) if word)
                    copy = nn.Parameter(kept.detach().float().clone())
                    self._places[full], self._copies[full] = (module, name, kept), copy
                    setattr(module, name, copy)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self._copies)

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        return Adapter({strip_text_model(path): (delta,) for path, delta in self._deltas().items()}, metadata)

    def _deltas(self) -> dict[str, Delta]:
        differences: dict[str, dict[str, Tensor]] = {}
        for full, (_, name, kept) in self._places.items():
            path = full.rpartition(".")[0]
            difference = self._copies[full].detach().float() - kept.detach().float()
            differences.setdefault(path, {})[NAMES[name]] = difference.cpu()
        options = self._options
        if options.rank is None and options.energy is None:
            return {path: FullDelta(leaves) for path, leaves in differences.items()}
        matrices = {
            path: leaves["diff"]
            for path, leaves in differences.items()
            if leaves["diff"].ndim > 1 and not is_embedding(strip_text_model(path))  # no tool applies a LoRA to those
        }
        size = RankBudget(options.rank, options.energy)
        small = {path: nearest(diff.flatten(1), size).lora(tuple(diff.shape)) for path, diff in matrices.items()}
        return {path: delta for path, delta in small.items() if delta is not None}

    @torch.no_grad()
    def load(self, adapter: Adapter) -> set[str]:
        """Any deltas: what trains is the weight that they make."""
        refuse(adapter, "networks", "tokens")
        names = {(path, full.rpartition(".")[2]): full for full, path in self.paths().items()}
        for path, deltas in adapter.deltas.items():
            if (path, "weight") not in names:
                raise ValueError(f"{path} does not train here")
            weight = self._copies[names[path, "weight"]]
            bias = self._copies[names[path, "bias"]] if (path, "bias") in names else None
            for delta in deltas:
                if not delta.fits(tuple(weight.shape)):
                    here = " × ".join(map(str, weight.shape))
                    raise ValueError(f"{path} is for a layer of another shape than {here}, which this base has")
                new_weight, new_bias = delta.apply(weight, bias, 1.0)
                weight.copy_(new_weight)
                if bias is not None and new_bias is not None:
                    bias.copy_(new_bias)
        return set(adapter.deltas)

    def detach_modules(self, paths: Collection[str]) -> None:
        for full in [full for full, path in self.paths().items() if path in paths]:
            module, name, kept = self._places.pop(full)
            setattr(module, name, kept)
            del self._copies[full]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.detach()
        try:
            with super().disabled():
                yield
        finally:
            for full, (module, name, _) in self._places.items():
                setattr(module, name, self._copies[full])

    def detach(self) -> None:
        for module, name, kept in self._places.values():
            setattr(module, name, kept)


def read(leaves: Mapping[str, Tensor], alpha: float | None) -> Delta:  # noqa: ARG001  (it has none)
    """A difference from its leaves."""
    if not leaves or not set(leaves) <= set(NAMES.values()):
        raise ValueError(f"{', '.join(sorted(leaves))} are not the leaves of a full difference")
    return FullDelta(dict(leaves))


METHOD = Method(
    name="full",
    summary="every weight trains, as in the DreamBooth paper: the largest file, unless it is reduced",
    attach=AttachedFull,
    options=FullOptions,
    layers="all",
    unsupported={
        **dict.fromkeys(("rank", "alpha"), "every weight trains; to reduce what was learnt, set options.rank"),
        "layers": "every weight trains",
        "quantize": "every weight trains, and those in few bits cannot",
    },
    read=read,
)
