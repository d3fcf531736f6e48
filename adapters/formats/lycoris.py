"""The names of LyCORIS and of kohya's tools: ``<prefix>_<path, dots as underscores>.<leaf>``.

Prefixes are ``lora_unet``, ``lora_te`` (one text encoder) or ``lora_te1`` and ``lora_te2`` (two); each module also has
a 0-dimensional ``alpha``. Read as well are ``oft_unet`` of kohya's OFT, and ``lycoris``, which LyCORIS gives to any one
module that it is laid on: a UNet, or a text encoder where the paths are those of one. The paths of the UNet are
diffusers' own for Stable Diffusion 1 and 2, and the original layout's for XL; both are read for all. Text encoders'
have the level ``text_model``. New words, where a file brings them along, are ``bundle_emb.<word>.<key>`` with a key of
`embedding`: ``string_to_param.*`` where there is one text encoder, ``clip_l`` and ``clip_g`` where there are two.
Sources: LyCORIS 4.1.3, ``lycoris/modules`` and ``wrapper.py``; sd-scripts, ``networks/lora.py`` and ``oft.py``.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.dora import LEAF, LYCORIS
from diffgraft.adapters.formats import embedding
from diffgraft.adapters.formats.families import family_of, layers_of, may_be_xl, with_base
from diffgraft.adapters.formats.header import read_metadata, write_ours
from diffgraft.adapters.formats.joined import joined
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.formats.modules import ENDINGS, KINDS, LAYERS, Module, leaf_of, read_modules
from diffgraft.adapters.method import add_text_model
from diffgraft.bases.ldm_keys import BlockLayout

PREFIXES = {
    "lora_unet": "unet",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te": "text_encoder",
    "oft_unet": "unet",
    "lycoris": "unet",
}
_BEGINS = [f"{prefix}_" for prefix in PREFIXES]
_OF_TEXT = ("text_model.", "encoder.", "embeddings.", "final_layer_norm", "text_projection")
"""What the paths of text encoders begin with."""

_OF_NORMS = {"diff": "w_norm", "diff_b": "b_norm"}
"""What the differences of a normalisation's weight [c] and bias are called."""

_SEGMENTS = """
down_blocks up_blocks mid_block transformer_blocks proj_in proj_out to_q to_k to_v to_out time_emb_proj
conv_shortcut conv_in conv_out conv_norm_out time_embedding add_embedding linear_1 linear_2 text_model self_attn q_proj
k_proj v_proj out_proj layer_norm1 layer_norm2 final_layer_norm text_projection
token_embedding position_embedding
input_blocks output_blocks middle_block in_layers out_layers emb_layers skip_connection time_embed label_emb
"""
_SEGMENT = re.compile("(?:" + "|".join(sorted(_SEGMENTS.split(), key=len, reverse=True)) + r"|[a-z0-9]+)(?:_|$)")
"""One level of a path: names that hold underscores themselves first."""


def flat(path: str) -> str:
    """A module's path as these names have it."""
    return path.replace(".", "_")


def dotted(name: str) -> str:
    """The path again: ``mid_block_attentions_0_proj_in`` → ``mid_block.attentions.0.proj_in``."""
    return ".".join(found.removesuffix("_") for found in _SEGMENT.findall(name))


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the keys look like this dialect."""
    return any(key.startswith(tuple(f"{prefix}_" for prefix in PREFIXES)) and "." in key for key in tensors)


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], layers: int | None = None) -> Adapter:
    """Every key is used, or named in a ValueError.

    Args:
        tensors: by key.
        header: of the file.
        layers: layers in a block of the UNet that the file is for, where that is known.
    """
    modules: dict[str, Module] = {}
    bundled: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if embedding.is_bundled(key):
            bundled[key] = value
            continue
        name, _, ending = key.partition(".")
        prefix = next((prefix for prefix in PREFIXES if name.startswith(f"{prefix}_")), None)
        leaf = leaf_of(ending)
        if prefix is None or leaf is None:
            raise UnknownKeyError(key, f"<prefix>_<module>.<leaf> of {', '.join(KINDS)}", _BEGINS, ENDINGS)
        module = modules.setdefault(name, Module(*_placed(prefix, dotted(name.removeprefix(f"{prefix}_")))))
        module.put(key, leaf, value)
        module.stilled |= prefix == "oft_unet" and leaf == "alpha" and not value.any()
    return read_adapter(modules, bundled, header, layers, by_kohya=True)


def read_adapter(
    modules: Mapping[str, Module],
    bundled: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None,
    *,
    by_kohya: bool,
) -> Adapter:
    """The adapter of a file's modules, and of the keys of words. Raises ValueError where they do not fit together.

    `by_kohya` tells that names are those of kohya's tools, which have the original layout's for XL alone.
    """
    if not modules:
        raise ValueError("it holds words alone, which these files only bring along with weights")
    tokens = embedding.read(bundled, {}).tokens if bundled else {}
    found = read_modules(modules, layers)
    said = {"method": _method(found.deltas, bool(tokens)), **({"trigger": next(iter(tokens))} if tokens else {})}
    if any(LEAF in delta.leaves for own in found.deltas.values() for delta in own):
        said["dora"] = LYCORIS
    adapter = Adapter(found.deltas, read_metadata(header, **said), tokens=tokens)
    if by_kohya and found.layers is not None and family_of(adapter) is None and may_be_xl(found.deltas):
        adapter = with_base(adapter, family="sdxl")
    return with_base(adapter, layers_per_block=found.layers) if found.layers not in (None, 2) else adapter


def _placed(prefix: str, inside: str) -> tuple[str, str]:
    """The part and the path inside it, from the prefix and what stands behind it, with dots."""
    if prefix == "lycoris" and inside.startswith(_OF_TEXT):
        return "text_encoder", inside.removeprefix("text_model.")
    part = PREFIXES[prefix]
    return part, inside if part == "unet" else inside.removeprefix("text_model.")


def _method(deltas: Mapping[str, tuple[Delta, ...]], with_words: bool) -> str:
    """What made a file that does not say: LoRA on convolutions is called LoCon."""
    if with_words:
        return "pivotal"
    kinds = {delta.kind for found in deltas.values() for delta in found}
    if not all(delta.is_lora for found in deltas.values() for delta in found):
        return next(iter(kinds)) if len(kinds) == 1 else "mixed"
    wide = (leaf for found in deltas.values() for delta in found for name, leaf in delta.leaves.items() if name != LEAF)
    return "locon" if any(leaf.ndim == 4 and leaf.shape[2:] != (1, 1) for leaf in wide) else "lora"


def _norms(leaf: Tensor, delta: Delta) -> Tensor:
    """``dora_scale`` [out, 1, …], as files have it: those that were trained here are [out]."""
    return leaf.view(-1, *[1] * (delta.leaves["lora_down"].ndim - 1)) if leaf.ndim == 1 else leaf


def _written_alpha(adapter: Adapter, delta: Delta) -> float:
    """Alpha as files have it. A LoKr of whole factors has no scale here; other tools divide it by the rank.

    LyCORIS writes the rank as the alpha of such layers, and OneTrainer scales by alpha / rank as everywhere.
    """
    assert delta.alpha is not None
    rank = adapter.metadata.get("rank")
    is_whole = {"lokr_w1", "lokr_w2"} <= set(delta.leaves)
    return float(rank) if is_whole and isinstance(rank, int) and rank > 0 else float(delta.alpha)


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header. Raises ValueError where a module holds something that has no name here."""
    if not adapter.deltas:
        raise ValueError("it holds no weights, and these files are for weights, with or without words")
    is_xl = family_of(adapter) == "sdxl"
    blocks = BlockLayout(layers_of(adapter), (False, True, True)) if is_xl else None
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if is_xl else "lora_te", "text_encoder_2": "lora_te2"}
    tensors: dict[str, Tensor] = {}
    for path, found in adapter.deltas.items():
        part, _, inside = path.partition(".")
        if blocks is not None and part == "unet":
            inside = blocks.to_ldm(inside)
        if part not in prefixes or dotted(flat(inside)) != inside:
            raise ValueError(f"the path {path} cannot be told apart in names with underscores")
        start = f"{prefixes[part]}_{flat(inside if part == 'unet' else add_text_model(inside))}"
        for delta in joined(path, found):
            if delta.kind not in KINDS:
                raise ValueError(f"{path} holds a {delta.kind}; these files have {', '.join(KINDS)}")
            of_norm = "diff" in delta.leaves and delta.leaves["diff"].ndim == 1
            for name, leaf in delta.leaves.items():
                column = _norms(leaf, delta) if name == LEAF else leaf
                key = f"{start}.{_OF_NORMS[name] if of_norm else name}"
                tensors[key + (".weight" if name in LAYERS else "")] = column.contiguous()
            if delta.alpha is not None:
                tensors[f"{start}.alpha"] = torch.tensor(_written_alpha(adapter, delta))
    for word, vectors in adapter.tokens.items():
        if set(vectors) == {"text_encoder"}:
            tensors[f"bundle_emb.{word}.string_to_param.*"] = vectors["text_encoder"].contiguous()
        else:
            keys = {part: key for key, part in embedding.PARTS.items()}
            tensors |= {f"bundle_emb.{word}.{keys[part]}": value.contiguous() for part, value in vectors.items()}
    return tensors, {"format": "pt", **write_ours(adapter)}


DIALECT = Dialect(
    name="lycoris",
    summary="the names of kohya's tools, without their header",
    order=50,
    recognises=recognises,
    read=read,
    write=write,
)
