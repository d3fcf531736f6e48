"""The key names of LyCORIS and of kohya's tools: ``<prefix>_<path, dots as underscores>.<leaf>``.

Prefixes are ``lora_unet``, ``lora_te`` (one text encoder) or ``lora_te1`` and ``lora_te2`` (two); each module also has
a 0-dimensional ``alpha``. Two more are read: ``oft_unet`` of kohya's OFT, and ``lycoris``, which LyCORIS uses for any
single module that it wraps: a UNet, or a text encoder if the paths are those of one. Paths of the UNet are those of
diffusers for Stable Diffusion 1 and 2, and those of the original layout for XL; both are read for all. Paths of text
encoders have the level ``text_model``.

Denoisers that are transformers have the prefix ``lora_unet`` too, and the paths of the original layout, in which
queries, keys and values are one layer. Both layouts are read, also under the prefixes ``lora_transformer`` of
OneTrainer and ``lycoris`` of SimpleTuner. T5 is ``lora_te3``.

Words inside an adapter file are ``bundle_emb.<word>.<key>``, with a key of `embedding`: ``string_to_param.*`` for one
text encoder, ``clip_l`` and ``clip_g`` for two.
Sources: LyCORIS 4.1.3, ``lycoris/modules`` and ``wrapper.py``; sd-scripts, ``networks/lora.py``, ``oft.py``,
``lora_flux.py`` and ``lora_sd3.py``; musubi-tuner, ``networks/lora.py``; OneTrainer, ``convert_flux_lora.py``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.dora import LEAF, LYCORIS
from diffgraft.adapters.formats import embedding, original_names
from diffgraft.adapters.formats.families import base_entry, family_of, layers_of, may_be_sdxl, with_base
from diffgraft.adapters.formats.header import read_metadata, write_metadata
from diffgraft.adapters.formats.join_deltas import join_deltas
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.formats.modules import ENDINGS, KINDS, LAYERS, Module, leaf_of, read_modules
from diffgraft.adapters.method import add_text_model
from diffgraft.bases.layout_names import layouts
from diffgraft.bases.ldm_keys import BlockLayout

PREFIXES = {
    "lora_unet": "unet",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_te": "text_encoder",
    "oft_unet": "unet",
    "lycoris": "unet",
    "lora_transformer": original_names.PART,
}
_DENOISER_PREFIXES = ("lora_unet", "lycoris", "lora_transformer")
"""Prefixes under which files also have the layers of a transformer"""
_T5 = {"flux1": "text_encoder_2"}
"""Family → its T5, for families in which it is not the third text encoder"""
_ONE_TEXT_ENCODER = ("anima",)
"""Families of transformers whose text encoder has no number in the files of sd-scripts"""
_BEGINS = [f"{prefix}_" for prefix in PREFIXES]
_TEXT_PATHS = ("text_model.", "encoder.", "embeddings.", "final_layer_norm", "text_projection")
"""Beginnings of module paths inside text encoders"""

_NORM_LEAVES = {"diff": "w_norm", "diff_b": "b_norm"}
"""Leaf → its name in files, for differences of a normalisation's weight [c] and bias"""

_SEGMENTS = """
down_blocks up_blocks mid_block transformer_blocks proj_in proj_out to_q to_k to_v to_out time_emb_proj
conv_shortcut conv_in conv_out conv_norm_out time_embedding add_embedding linear_1 linear_2 text_model self_attn q_proj
k_proj v_proj out_proj layer_norm1 layer_norm2 final_layer_norm text_projection
token_embedding position_embedding wi_0 wi_1
input_blocks output_blocks middle_block in_layers out_layers emb_layers skip_connection time_embed label_emb
"""
_SEGMENT = re.compile("(?:" + "|".join(sorted(_SEGMENTS.split(), key=len, reverse=True)) + r"|[a-zA-Z0-9]+)(?:_|$)")
"""A single level of a path; names that contain underscores themselves are tried first"""


def to_underscores(path: str) -> str:
    """Write a module path as these files do, with underscores for dots."""
    return path.replace(".", "_")


def to_dots(name: str) -> str:
    """Restore a module path from its name: ``mid_block_attentions_0_proj_in`` → ``mid_block.attentions.0.proj_in``."""
    return ".".join(segment.removesuffix("_") for segment in _SEGMENT.findall(name))


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether a key begins with one of the prefixes of this dialect."""
    return any(key.startswith(tuple(f"{prefix}_" for prefix in PREFIXES)) and "." in key for key in tensors)


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], layers: int | None = None) -> Adapter:
    """Build the adapter.

    Args:
        tensors: tensors by key.
        header: header of the file.
        layers: layers per block of the base's UNet, if known.

    Raises:
        ValueError: a key is unknown, or leaves do not fit together.
    """
    modules: dict[str, Module] = {}
    bundled: dict[str, Tensor] = {}
    in_transformer = _is_for_transformer(tensors)
    for key, value in tensors.items():
        if embedding.is_bundled(key):
            bundled[key] = value
            continue
        name, _, ending = key.partition(".")
        prefix = next((prefix for prefix in PREFIXES if name.startswith(f"{prefix}_")), None)
        leaf = leaf_of(ending)
        if prefix is None or leaf is None:
            raise UnknownKeyError(key, f"<prefix>_<module>.<leaf> of {', '.join(KINDS)}", _BEGINS, ENDINGS)
        inside = name.removeprefix(f"{prefix}_")
        if in_transformer and prefix in _DENOISER_PREFIXES:
            part, path = original_names.PART, inside
        else:
            part, path = _part_and_path(prefix, to_dots(inside))
        module = modules.setdefault(name, Module(part, path))
        module.add_leaf(key, leaf, value)
        module.has_zero_bound |= prefix == "oft_unet" and leaf == "alpha" and not value.any()
    return read_adapter(modules, bundled, header, layers, has_kohya_names=True)


def _is_for_transformer(keys: Iterable[str]) -> bool:
    """Whether a key names a layer of a transformer; then all modules with the prefixes of denoisers are such layers."""
    for key in keys:
        name = key.partition(".")[0]
        prefix = next((prefix for prefix in _DENOISER_PREFIXES if name.startswith(f"{prefix}_")), None)
        if prefix is not None and original_names.is_known(name.removeprefix(f"{prefix}_")):
            return True
    return False


def read_adapter(
    modules: Mapping[str, Module],
    bundled: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None,
    *,
    has_kohya_names: bool,
) -> Adapter:
    """Build the adapter from a file's modules and the tensors of its words.

    Args:
        modules: name in the file → module.
        bundled: tensors of words, by key.
        header: header of the file.
        layers: layers per block of the base's UNet, if known.
        has_kohya_names: whether names are those of kohya's tools, which use the original layout only for XL.

    Raises:
        ValueError: leaves do not fit together, or there are words but no modules.
    """
    if not modules:
        raise ValueError("it holds only words, but such files hold words only beside weights")
    tokens = embedding.read(bundled, {}).tokens if bundled else {}
    metadata = read_metadata(header)
    contents = read_modules(modules, layers, base_entry(metadata, "family"))
    inferred = {"method": _method(contents.deltas, bool(tokens))}
    if tokens:
        inferred["trigger"] = next(iter(tokens))
    if any(LEAF in delta.leaves for deltas in contents.deltas.values() for delta in deltas):
        inferred["dora"] = LYCORIS
    adapter = Adapter(contents.deltas, read_metadata(header, **inferred), tokens=tokens)
    if contents.family is not None:
        return with_base(_with_t5(adapter, contents.family), family=contents.family)
    has_original_names = contents.layers is not None
    if has_kohya_names and has_original_names and family_of(adapter) is None and may_be_sdxl(contents.deltas):
        adapter = with_base(adapter, family="sdxl")
    return with_base(adapter, layers_per_block=contents.layers) if contents.layers not in (None, 2) else adapter


def _part_and_path(prefix: str, inside: str) -> tuple[str, str]:
    """The part, and the path inside it, of a module with this prefix and dotted name."""
    if prefix == "lycoris" and inside.startswith(_TEXT_PATHS):
        return "text_encoder", inside.removeprefix("text_model.")
    part = PREFIXES[prefix]
    return part, inside if part == "unet" else inside.removeprefix("text_model.")


def _with_t5(adapter: Adapter, family: str) -> Adapter:
    """Rename the text encoder that ``lora_te3`` stands for, if it is not the third in the family."""
    renamed = {
        path.replace("text_encoder_3.", f"{_T5[family]}.", 1) if family in _T5 else path: deltas
        for path, deltas in adapter.deltas.items()
    }
    return replace(adapter, deltas=renamed)


def _method(deltas: Mapping[str, tuple[Delta, ...]], with_words: bool) -> str:
    """Method that probably made the file; LoRA on convolutions is LoCon."""
    if with_words:
        return "pivotal"
    all_deltas = [delta for module_deltas in deltas.values() for delta in module_deltas]
    kinds = {delta.kind for delta in all_deltas}
    if not all(delta.is_lora for delta in all_deltas):
        return next(iter(kinds)) if len(kinds) == 1 else "mixed"
    factors = (leaf for delta in all_deltas for name, leaf in delta.leaves.items() if name != LEAF)
    return "locon" if any(leaf.ndim == 4 and leaf.shape[2:] != (1, 1) for leaf in factors) else "lora"


def _norms_as_in_lycoris(leaf: Tensor, delta: Delta) -> Tensor:
    """Reshape DoRA norms from [out], as trained here, to [out, 1, …], as in files; return norms of inputs unchanged."""
    return leaf.view(-1, *[1] * (delta.leaves["lora_down"].ndim - 1)) if leaf.ndim == 1 else leaf


def _written_alpha(adapter: Adapter, delta: Delta) -> float:
    """Alpha as files have it; for a LoKr of unsplit factors, which has no scale here, it is the rank.

    LyCORIS writes the rank as the alpha of such layers, as other tools divide alpha by the rank, also for them.
    """
    assert delta.alpha is not None
    rank = adapter.metadata.get("rank")
    is_whole = {"lokr_w1", "lokr_w2"} <= set(delta.leaves)
    return float(rank) if is_whole and isinstance(rank, int) and rank > 0 else float(delta.alpha)


def named_leaves(adapter: Adapter, path: str, delta: Delta) -> dict[str, Tensor]:
    """Return the leaves of a delta, and its alpha, under their names in files.

    Args:
        adapter: adapter that the delta belongs to.
        path: path of its module, for messages.
        delta: the delta.

    Raises:
        ValueError: such files cannot hold deltas of its kind.
    """
    if delta.kind not in KINDS:
        raise ValueError(f"{path} holds a delta of kind {delta.kind}; such files hold {', '.join(KINDS)}")
    is_norm = "diff" in delta.leaves and delta.leaves["diff"].ndim == 1
    named: dict[str, Tensor] = {}
    for name, leaf in delta.leaves.items():
        value = _norms_as_in_lycoris(leaf, delta) if name == LEAF else leaf
        key = _NORM_LEAVES[name] if is_norm else name
        named[key + (".weight" if name in LAYERS else "")] = value.contiguous()
    if delta.alpha is not None:
        named["alpha"] = torch.tensor(_written_alpha(adapter, delta))
    return named


def _named_modules(adapter: Adapter) -> Iterator[tuple[str, str, Sequence[Delta]]]:
    """Yield each module with deltas as files have it: beginning of its keys, path for messages, and deltas.

    Raises:
        ValueError: a module has no name in such files, or is a part of a layer that they cannot hold.
    """
    family = family_of(adapter)
    has_transformer = original_names.is_for_transformer(adapter) or family in layouts()
    blocks = BlockLayout(layers_of(adapter), (False, True, True)) if family == "sdxl" else None
    first = "lora_te1" if (blocks or has_transformer) and family not in _ONE_TEXT_ENCODER else "lora_te"
    second = "lora_te3" if family in _T5 else "lora_te2"
    prefixes = {"unet": "lora_unet", "text_encoder": first, "text_encoder_2": second, "text_encoder_3": "lora_te3"}
    for path, deltas in adapter.deltas.items():
        part, _, inside = path.partition(".")
        if part == original_names.PART:
            continue
        if blocks is not None and part == "unet":
            inside = blocks.to_ldm(inside)
        if part not in prefixes or to_dots(to_underscores(inside)) != inside:
            raise ValueError(
                f"the path {path} is ambiguous when written with underscores: use the layout of diffusers, "
                "or choose other layers by --only"
            )
        yield f"{prefixes[part]}_{to_underscores(inside if part == 'unet' else add_text_model(inside))}", path, deltas
    for path, deltas in original_names.write_layers(adapter, family).items():
        yield f"lora_unet_{to_underscores(path)}", f"{original_names.PART}.{path}", deltas


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header. Raises ValueError for contents that such files cannot hold."""
    if not adapter.deltas:
        raise ValueError("it has only token embeddings, and a LyCORIS file needs weights; convert to embedding instead")
    tensors: dict[str, Tensor] = {}
    for start, path, module_deltas in _named_modules(adapter):
        for delta in join_deltas(path, module_deltas):
            tensors |= {f"{start}.{leaf}": value for leaf, value in named_leaves(adapter, path, delta).items()}
    return tensors | embedding.bundle(adapter.tokens), {"format": "pt", **write_metadata(adapter)}


DIALECT = Dialect(
    name="lycoris",
    summary="the names of kohya's tools, without their header",
    order=50,
    recognises=recognises,
    read=read,
    write=write,
)
