"""Full fine-tuning, as DreamBooth was published (Ruiz et al. 2022, arXiv:2208.12242): every weight of a part trains.

Training changes copies; the base's own tensors are set aside, and restored on detaching. The adapter is the difference,
either complete, or reduced to a LoRA by a truncated singular value decomposition (Eckart and Young 1936) of a given
rank, or of the rank that holds a given share of each difference's energy.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter, Delta, LinearDelta
from diffgraft.adapters.lowrank import RankBudget, approximate
from diffgraft.adapters.method import Attached, Method, Options, Spec, refuse, strip_text_model
from diffgraft.adapters.projections import same_layer
from diffgraft.bases.layers import is_embedding, parts_of
from diffgraft.errors import DiffgraftError

NAMES = {"weight": "diff", "bias": "diff_b"}
"""Name of a module's parameter → name of its difference in files (LyCORIS, ``lycoris/modules/full.py``)"""


@dataclass(frozen=True, repr=False)
class FullDelta(LinearDelta):
    """Difference of a weight and, if the module has one, of a bias."""

    leaves: Mapping[str, Tensor]
    """``diff`` in the shape of the weight, and ``diff_b`` in the shape of the bias; either may be missing"""

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
    """Options of full fine-tuning: how the difference is saved."""

    rank: int | None = Field(None, ge=1)
    """Reduce each layer's difference to a LoRA of this rank; changes of biases, norms and embeddings are dropped"""
    energy: float | None = Field(None, gt=0, lt=1)
    """Reduce each layer's difference to a LoRA of the least rank that holds this share of its squared norm"""


class AttachedFull(Attached):
    """Trainable copies in place of the weights and biases of whole parts of a base.

    Parameters of other names, such as the embedding of padding in some transformers, stay frozen: files of adapters
    have no place for them.
    """

    def __init__(self, target: Any, spec: Spec) -> None:
        super().__init__()
        self._options: FullOptions = spec.options
        self._originals: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
        self._copies: dict[str, nn.Parameter] = {}
        parts = parts_of(target)
        if any(not value.is_floating_point() for part in spec.paths for value in parts[part].parameters()):
            raise DiffgraftError(
                "The method 'full' trains the base's own weights, but they are quantised: set quantize=none, or choose "
                "another method."
            )
        for part in spec.paths:
            for path, module in parts[part].named_modules():
                own = {name: value for name, value in module.named_parameters(recurse=False) if name in NAMES}
                for name, original in own.items():
                    full_name = ".".join(word for word in (part, path, name) if word)
                    copy = nn.Parameter(original.detach().float().clone())
                    self._originals[full_name], self._copies[full_name] = (module, name, original), copy
                    setattr(module, name, copy)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self._copies)

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        return Adapter({strip_text_model(path): (delta,) for path, delta in self._deltas().items()}, metadata)

    def _deltas(self) -> dict[str, Delta]:
        differences: dict[str, dict[str, Tensor]] = {}
        for full_name, (_, name, original) in self._originals.items():
            path = full_name.rpartition(".")[0]
            difference = self._copies[full_name].detach().float() - original.detach().float()
            differences.setdefault(path, {})[NAMES[name]] = difference.cpu()
        options = self._options
        if options.rank is None and options.energy is None:
            return {path: FullDelta(leaves) for path, leaves in differences.items()}
        matrices = {
            path: leaves["diff"]
            for path, leaves in differences.items()
            if leaves["diff"].ndim > 1 and not is_embedding(strip_text_model(path))  # no tool applies a LoRA to those
        }
        budget = RankBudget(options.rank, options.energy)
        loras = {path: approximate(diff.flatten(1), budget).lora(tuple(diff.shape)) for path, diff in matrices.items()}
        return {path: delta for path, delta in loras.items() if delta is not None}

    @torch.no_grad()
    def load(self, adapter: Adapter) -> set[str]:
        """Start from deltas of any kind, by applying them to the trained weights."""
        refuse(adapter, "networks", "tokens")
        names = {(path, full_name.rpartition(".")[2]): full_name for full_name, path in self.paths().items()}
        for path, deltas in adapter.deltas.items():
            if (path, "weight") not in names:
                raise ValueError(f"{path} is not trained here")
            weight = self._copies[names[path, "weight"]]
            bias = self._copies[names[path, "bias"]] if (path, "bias") in names else None
            for delta in deltas:
                if not delta.fits(tuple(weight.shape)):
                    shape = " × ".join(map(str, weight.shape))
                    raise ValueError(f"{path} does not fit this base's layer of shape {shape}")
                new_weight, new_bias = delta.apply(weight, bias, 1.0)
                weight.copy_(new_weight)
                if bias is not None and new_bias is not None:
                    bias.copy_(new_bias)
        return set(adapter.deltas)

    def detach_modules(self, paths: Collection[str]) -> None:
        for full_name in [full_name for full_name, path in self.paths().items() if path in paths]:
            module, name, original = self._originals.pop(full_name)
            setattr(module, name, original)
            del self._copies[full_name]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.detach()
        try:
            with super().disabled():
                yield
        finally:
            for full_name, (module, name, _) in self._originals.items():
                setattr(module, name, self._copies[full_name])

    def detach(self) -> None:
        for module, name, original in self._originals.values():
            setattr(module, name, original)


def read(leaves: Mapping[str, Tensor], alpha: float | None) -> Delta:  # noqa: ARG001  (a difference has no alpha)
    """Build the difference from its leaves. Raises ValueError for leaves of another kind."""
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
        **dict.fromkeys(("rank", "alpha"), "every weight trains; options.rank reduces the result to a LoRA"),
        "layers": "every weight trains",
        "quantize": "every weight trains, which quantised weights cannot",
    },
    read=read,
)
