"""Modules of files with one name and several leaves per module, as LyCORIS, kohya, ComfyUI and OneTrainer write them.

How a module is named, with dots or underscores, in diffusers' names or those of the original layout, depends on the
dialect; the meaning of its leaves is the same in all of them, and is defined here. A file can hold a layer under
several names, as tools that merge files by key names leave it; the deltas are then summed. If two names hold exactly
the same values, they are one delta, stored twice for programs that know only one of the names, and count once.
Sources: LyCORIS 4.1.3, ``lycoris/modules`` and ``utils``; ComfyUI, ``comfy/lora.py``; OneTrainer, ``LoRAModule.py``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Delta, LinearDelta
from diffgraft.adapters.dora import LEAF
from diffgraft.adapters.formats.families import to_diffusers_names
from diffgraft.adapters.formats.header import finite_number
from diffgraft.adapters.formats.original_names import PART, read_layers
from diffgraft.adapters.ops.effect import LARGEST
from diffgraft.adapters.projections import match_conv_axes
from diffgraft.adapters.registry import read_delta
from diffgraft.bases.ldm_keys import LDM_PREFIXES

KINDS = {
    "lora": ("lora_down", "lora_up", "lora_mid", "dora_scale"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale"),
    "full": ("diff", "diff_b"),
    "ia3": ("weight", "on_input"),
    "glora": ("a1", "a2", "b1", "b2", "bm"),
    "oft": ("oft_blocks", "rescale"),
    "boft": ("oft_blocks", "rescale"),
    "oft-inputs": ("oft_R", "scaled_oft"),
}
"""Kind of delta → its leaves. Keys of the leaves of LoRA and GLoRA end in ``.weight``, as those leaves are layers"""
LAYERS = {*KINDS["lora"], *KINDS["glora"], "oft_R"} - {LEAF}
_WITH_EXTRAS = ("lora", "loha", "lokr")
"""Kinds beside which a module may also have a difference of its bias, or a sparse remainder of its weight"""
_SPARSE = ("bias_indices", "bias_values", "bias_size")
"""Leaves of the sparse remainder of a low-rank matrix, which LyCORIS' ``extract`` writes with ``use_sparse_bias``:
indices [2, n], values [n] and the shape of the matrix [out, in · kernel]. Despite the names, it belongs to the weight
"""
OTHER_NAMES = {
    "w_norm": "diff",
    "b_norm": "diff_b",
    "lora_A": "lora_down",
    "lora_B": "lora_up",
    "magnitude": LEAF,
    "lora_magnitude_vector": LEAF,
    "oft_R.scaled_oft": "scaled_oft",
}
"""Other names of leaves → their names here: differences of normalisations, and the names of peft and ai-toolkit"""
LEAVES = {"alpha", *_SPARSE, *(leaf for leaves in KINDS.values() for leaf in leaves)}
ENDINGS = [f".{leaf}.weight" if leaf in LAYERS else f".{leaf}" for leaf in sorted(LEAVES)]


def leaf_of(ending: str) -> str | None:
    """The leaf that the end of a key, behind the module's name, stands for; None if there is no such leaf."""
    leaf = ending.removesuffix(".weight")
    leaf = OTHER_NAMES.get(leaf, leaf)
    return leaf if leaf in LEAVES else None


@dataclass
class Module:
    """A module of a file, with its leaves."""

    part: str
    """`unet`, `transformer`, `text_encoder`, `text_encoder_2` or `text_encoder_3`"""
    inside: str
    """Path inside the part, with dots, in diffusers' names or in those of the original layout"""
    leaves: dict[str, Tensor] = field(default_factory=dict)
    has_zero_bound: bool = False
    """Whether its rotations are bounded by 0, so that it does nothing: so in kohya's OFT; in LyCORIS', 0 is no bound"""

    def add_leaf(self, key: str, leaf: str, value: Tensor) -> None:
        """Store `value` as the leaf. Raises ValueError if the module already has it, from a key with another name."""
        if leaf in self.leaves:
            raise ValueError(f"the key {key} repeats the leaf {leaf} of {self.part}.{self.inside}")
        self.leaves[leaf] = value


@dataclass(frozen=True)
class ModuleDeltas:
    """Deltas of all modules of a file."""

    deltas: dict[str, tuple[Delta, ...]]
    """Module path, as in `Adapter.deltas` → its deltas"""
    layers: int | None
    """Layers per block of the UNet by which names of the original layout count; None if there are no such names"""
    family: str | None
    """Family of the transformer that the modules are of; None if they do not tell, or are of a UNet"""


def read_modules(modules: Mapping[str, Module], layers: int | None, family: str | None = None) -> ModuleDeltas:
    """Build the deltas of the modules of a file.

    Args:
        modules: module name in the file → its leaves.
        layers: layers per block of the base's UNet, if known.
        family: family of the base, if the file's header names it.

    Raises:
        ValueError: leaves do not fit together, or names match no known UNet or transformer, or more than one.
    """
    built = {name: tuple(_deltas(module)) for name, module in modules.items()}
    original_names = {
        module.inside: built[name]
        for name, module in modules.items()
        if module.part == "unet" and module.inside.startswith(LDM_PREFIXES)
    }
    names, layers = to_diffusers_names(original_names, layers) if original_names else ({}, None)
    of_transformer = {name: (module.inside, built[name]) for name, module in modules.items() if module.part == PART}
    split = read_layers(of_transformer, family) if of_transformer else None
    copies: dict[str, list[tuple[Delta, ...]]] = {}
    for name, module in modules.items():
        inside = names.get(module.inside, module.inside) if module.part == "unet" else module.inside
        own = [(inside.removeprefix("text_model."), built[name])]
        for path, deltas in split.layers[name] if split and module.part == PART else own:
            earlier = copies.setdefault(f"{module.part}.{path}", [])
            if not any(_are_equal(deltas, other) for other in earlier):
                earlier.append(deltas)
    combined = {path: _combined(path, different) for path, different in copies.items()}
    return ModuleDeltas(combined, layers, split.family if split else None)


def _combined(path: str, copies: Sequence[tuple[Delta, ...]]) -> tuple[Delta, ...]:
    """The deltas of a module that the file holds under several names, with different values under each."""
    combined = tuple(delta for deltas in copies for delta in deltas)
    nonlinear = next((delta for delta in combined if not isinstance(delta, LinearDelta)), None)
    if len(copies) > 1 and nonlinear is not None:
        kind = "DoRA" if LEAF in nonlinear.leaves else nonlinear.kind
        raise ValueError(
            f"it holds {path} {len(copies)} times, under different names, and one of them is {kind}: tools differ in "
            "how they combine these, so remove all but one of them"
        )
    return combined


def _are_equal(first: tuple[Delta, ...], second: tuple[Delta, ...]) -> bool:
    """Whether deltas hold the same values, in any dtype, for a linear layer or for a 1 × 1 convolution."""
    return len(first) == len(second) and all(
        a.kind == b.kind
        and a.alpha == b.alpha
        and set(a.leaves) == set(b.leaves)
        and all(
            torch.equal(leaf.float(), other[name].float()) for name, leaf in match_conv_axes(a.leaves, (1, 1)).items()
        )
        for a, b in zip(first, second, strict=True)
        for other in [match_conv_axes(b.leaves, (1, 1))]
    )


def _deltas(module: Module) -> Iterator[Delta]:
    """Yield the deltas of one module: that of its kind, and those of a bias or a sparse remainder beside it."""
    path, leaves = f"{module.part}.{module.inside}", dict(module.leaves)
    alpha = leaves.pop("alpha", None)
    if module.has_zero_bound:
        leaves = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    sparse = {name: leaves.pop(name) for name in _SPARSE if name in leaves}
    bias = leaves.pop("diff_b") if "diff_b" in leaves and "diff" not in leaves else None
    kind = next((kind for kind, names in KINDS.items() if leaves and set(leaves) <= set(names)), None)
    if (kind is None and (leaves or bias is None)) or (bias is not None and kind not in (None, *_WITH_EXTRAS)):
        names = ", ".join(sorted(module.leaves)) or "only an alpha"
        raise ValueError(f"{path} has the leaves {names}, which are not those of one method")
    if kind in ("loha", "lokr"):  # OneTrainer's factors of 1 × 1 convolutions have kernel axes
        matrices = {name for name in leaves if "_w" in name and name != "lokr_w2"}
        leaves = {
            name: leaf[:, :, 0, 0] if name in matrices and leaf.ndim == 4 and leaf.shape[2:] == (1, 1) else leaf
            for name, leaf in leaves.items()
        }
    try:
        if bias is not None:
            yield read_delta("full", {"diff_b": bias}, None)
        if kind is not None:
            yield (first := read_delta(kind, leaves, _alpha(kind, leaves, alpha)))
            if sparse:
                yield read_delta("full", {"diff": _dense_sparse_part(first, sparse)}, None)
        elif sparse:
            raise ValueError(f"it has {', '.join(sparse)}, but no low-rank matrix, which these belong to")
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the factors of {path} do not fit together: {error}") from error


def _alpha(kind: str, leaves: Mapping[str, Tensor], alpha: Tensor | None) -> float | None:
    """Value of an alpha; None if it is missing, or infinite in a LoKr of unsplit factors, which has no scale."""
    if alpha is None:
        return None
    if alpha.numel() != 1:
        raise ValueError(f"alpha has shape {list(alpha.shape)}; expected a single number")
    value = alpha.float().item()
    if kind == "lokr" and {"lokr_w1", "lokr_w2"} <= set(leaves) and not math.isfinite(value):
        return None
    return finite_number(value)


def _dense_sparse_part(delta: Delta, sparse: Mapping[str, Tensor]) -> Tensor:
    """Return the sparse part of a weight difference (LyCORIS' ``bias_…``) as a dense matrix, times alpha / rank."""
    if set(sparse) != set(_SPARSE) or not delta.is_lora or not isinstance(delta, LinearDelta):
        raise ValueError(f"{', '.join(sparse)} are not a complete sparse remainder of a LoRA")
    down, up = delta.leaves["lora_down"], delta.leaves["lora_up"]
    mid = delta.leaves.get("lora_mid", down)
    shape = (up.shape[0], down.shape[1], *mid.shape[2:])
    size = tuple(sparse["bias_size"].flatten().long().tolist())
    if math.prod(shape) > LARGEST:
        raise ValueError(f"its sparse remainder has shape {list(shape)}, larger than the layers of any known base")
    indices, values = sparse["bias_indices"].long(), sparse["bias_values"]
    if math.prod(size) != math.prod(shape) or indices.ndim != 2 or indices.shape != (len(size), values.numel()):
        raise ValueError(f"its sparse remainder has shape {list(size)}, but the layer has {list(shape)}")
    if indices.numel() and (int(indices.min()) < 0 or (indices.amax(1) >= torch.tensor(size)).any()):
        raise ValueError("its sparse remainder has indices outside the matrix")
    dense = torch.zeros(size).index_put(tuple(indices), values.float().flatten(), accumulate=True)
    rank = down.shape[0]
    return (float(delta.alpha if delta.alpha is not None else rank) / rank) * dense.view(shape)
