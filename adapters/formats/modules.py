"""Modules of files that name a module and a leaf, as LyCORIS, kohya's, ComfyUI and OneTrainer do: leaves → deltas.

How a module is written, with dots or underscores, in diffusers' names or in the original layout's, is up to a dialect;
what its leaves mean is the same in all of them and stands here. One layer may stand in a file under several names: a
merge of two files that goes by the names of keys leaves it so. What such a file means is the sum. Where both hold the
very same numbers it is one copy under a second name, for programs that know only that one, and counts once.
Sources: LyCORIS 4.1.3, ``lycoris/modules`` and ``utils``; ComfyUI, ``comfy/lora.py``; OneTrainer, ``LoRAModule.py``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Delta, LinearDelta
from diffgraft.adapters.dora import LEAF
from diffgraft.adapters.formats.families import read_names
from diffgraft.adapters.formats.header import number
from diffgraft.adapters.ops.effect import LARGEST
from diffgraft.adapters.projections import laid_out
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
"""Kind of delta → its leaves. Those of LoRA and GLoRA stand for layers and end in ``.weight``; the others are bare."""
LAYERS = {*KINDS["lora"], *KINDS["glora"], "oft_R"} - {LEAF}
_BESIDE = ("lora", "loha", "lokr")
"""Kinds beside which a module may also have a difference of its bias, or a sparse rest of its weight."""
_SPARSE = ("bias_indices", "bias_values", "bias_size")
"""What a low-rank matrix leaves over, as LyCORIS' ``extract`` keeps it with ``use_sparse_bias``: indices [2, n], values
[n] and the shape of the matrix [out, in · kernel]. Its name is bias there; it is a part of the weight."""
OTHER_NAMES = {
    "w_norm": "diff",
    "b_norm": "diff_b",
    "lora_A": "lora_down",
    "lora_B": "lora_up",
    "magnitude": LEAF,
    "lora_magnitude_vector": LEAF,
    "oft_R.scaled_oft": "scaled_oft",
}
"""What leaves are called as well → what they are called here: differences of normalisations, peft's and ai-toolkit's
names."""
LEAVES = {"alpha", *_SPARSE, *(leaf for leaves in KINDS.values() for leaf in leaves)}
ENDINGS = [f".{leaf}.weight" if leaf in LAYERS else f".{leaf}" for leaf in sorted(LEAVES)]


def leaf_of(ending: str) -> str | None:
    """The leaf that the end of a key, behind the module's name, stands for; None where it is no leaf."""
    leaf = ending.removesuffix(".weight")
    leaf = OTHER_NAMES.get(leaf, leaf)
    return leaf if leaf in LEAVES else None


@dataclass
class Module:
    """One module as it stands in a file."""

    part: str
    """`unet`, `text_encoder` or `text_encoder_2`"""
    inside: str
    """Its path inside the part, with dots, in diffusers' names or in the original layout's"""
    leaves: dict[str, Tensor] = field(default_factory=dict)
    stilled: bool = False
    """Whether its rotations are bound by 0, which kohya's OFT has where LyCORIS' has no bound"""

    def put(self, key: str, leaf: str, value: Tensor) -> None:
        """Take `value` as the leaf. Raises ValueError where there is one already, under another name."""
        if leaf in self.leaves:
            raise ValueError(f"its key {key} is the second {leaf} of {self.part}.{self.inside}")
        self.leaves[leaf] = value


@dataclass(frozen=True)
class Read:
    """The modules of a file as an adapter has them."""

    deltas: dict[str, tuple[Delta, ...]]
    layers: int | None
    """Layers in a block of the UNet, where names of the original layout are counted by it; None where there are none"""


def read_modules(modules: Mapping[str, Module], layers: int | None) -> Read:
    """Deltas by the path that adapters have, of modules by the names that the file has.

    Args:
        modules: name in the file → module.
        layers: layers in a block of the UNet that the file is for, where that is known.

    Raises:
        ValueError: leaves do not fit together, or names fit no UNet, or several.
    """
    built = {name: tuple(_deltas(module)) for name, module in modules.items()}
    theirs = {
        module.inside: built[name]
        for name, module in modules.items()
        if module.part == "unet" and module.inside.startswith(LDM_PREFIXES)
    }
    names, layers = read_names(theirs, layers) if theirs else ({}, None)
    copies: dict[str, list[tuple[Delta, ...]]] = {}
    for name, module in modules.items():
        inside = names.get(module.inside, module.inside) if module.part == "unet" else module.inside
        earlier = copies.setdefault(f"{module.part}.{inside.removeprefix('text_model.')}", [])
        if not any(_same(built[name], other) for other in earlier):
            earlier.append(built[name])
    return Read({path: _together(path, different) for path, different in copies.items()}, layers)


def _together(path: str, copies: Sequence[tuple[Delta, ...]]) -> tuple[Delta, ...]:
    """The deltas of a module under as many names as there are `copies`, no two of which are the same."""
    together = tuple(delta for own in copies for delta in own)
    strange = next((delta for delta in together if not isinstance(delta, LinearDelta)), None)
    if len(copies) > 1 and strange is not None:
        what = "DoRA" if LEAF in strange.leaves else strange.kind
        raise ValueError(
            f"{path} stands in it {len(copies)} times, under different names, and one of them is {what}: what tools "
            "make of all together differs, so leave all but one of them out"
        )
    return together


def _same(one: tuple[Delta, ...], two: tuple[Delta, ...]) -> bool:
    """Whether they hold the same numbers, in whatever precision, for a linear layer or for a 1 × 1 convolution."""
    return len(one) == len(two) and all(
        a.kind == b.kind
        and a.alpha == b.alpha
        and set(a.leaves) == set(b.leaves)
        and all(torch.equal(leaf.float(), theirs[name].float()) for name, leaf in laid_out(a.leaves, (1, 1)).items())
        for a, b in zip(one, two, strict=True)
        for theirs in [laid_out(b.leaves, (1, 1))]
    )


def _deltas(module: Module) -> Iterator[Delta]:
    """The deltas of one module: one, or also what stands beside it."""
    path, leaves = f"{module.part}.{module.inside}", dict(module.leaves)
    alpha = leaves.pop("alpha", None)
    if module.stilled:
        leaves = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    sparse = {name: leaves.pop(name) for name in _SPARSE if name in leaves}
    bias = leaves.pop("diff_b") if "diff_b" in leaves and "diff" not in leaves else None
    kind = next((kind for kind, names in KINDS.items() if leaves and set(leaves) <= set(names)), None)
    if (kind is None and (leaves or bias is None)) or (bias is not None and kind not in (None, *_BESIDE)):
        raise ValueError(f"{path} has the leaves {', '.join(sorted(module.leaves)) or 'alpha alone'}: of no one method")
    if kind in ("loha", "lokr"):  # OneTrainer's, of 1 × 1 convolutions, have the axes of a kernel
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
                yield read_delta("full", {"diff": _rest(first, sparse)}, None)
        elif sparse:
            raise ValueError(f"it has {', '.join(sparse)} without a low-rank matrix")
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the factors of {path} do not fit together: {error}") from error


def _alpha(kind: str, leaves: Mapping[str, Tensor], alpha: Tensor | None) -> float | None:
    """Alpha, where it says something: of a LoKr of whole factors, which has no scale, some tools' is beyond float16."""
    if alpha is None:
        return None
    if alpha.numel() != 1:
        raise ValueError(f"alpha is {list(alpha.shape)}; one number was expected")
    value = alpha.float().item()
    if kind == "lokr" and {"lokr_w1", "lokr_w2"} <= set(leaves) and not math.isfinite(value):
        return None
    return number(value)


def _rest(delta: Delta, sparse: Mapping[str, Tensor]) -> Tensor:
    """A sparse rest as a whole matrix, in the shape of the weight and with the scale of the low-rank one."""
    if set(sparse) != set(_SPARSE) or not delta.is_lora or not isinstance(delta, LinearDelta):
        raise ValueError(f"{', '.join(sparse)} are no sparse rest of a LoRA")
    down, up = delta.leaves["lora_down"], delta.leaves["lora_up"]
    mid = delta.leaves.get("lora_mid", down)
    shape = (up.shape[0], down.shape[1], *mid.shape[2:])
    size = tuple(sparse["bias_size"].flatten().long().tolist())
    if math.prod(shape) > LARGEST:
        raise ValueError(f"its sparse rest is for a matrix of {list(shape)}, larger than the layers of any base known")
    indices, values = sparse["bias_indices"].long(), sparse["bias_values"]
    if math.prod(size) != math.prod(shape) or indices.ndim != 2 or indices.shape != (len(size), values.numel()):
        raise ValueError(f"its sparse rest is for a matrix of {list(size)}, and the layer is {list(shape)}")
    if indices.numel() and (int(indices.min()) < 0 or (indices.amax(1) >= torch.tensor(size)).any()):
        raise ValueError("its sparse rest has indices outside the matrix")
    whole = torch.zeros(size).index_put(tuple(indices), values.float().flatten(), accumulate=True)
    rank = down.shape[0]
    return (float(delta.alpha if delta.alpha is not None else rank) / rank) * whole.view(shape)
