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
from diffgraft.adapters.dora import LEAF, LYCORIS
from diffgraft.adapters.formats import embedding
from diffgraft.adapters.formats.header import number, told, write_ours
from diffgraft.adapters.formats.unknown import UnknownKeyError
from diffgraft.adapters.method import leveled, read_delta
from diffgraft.bases.original import Blocks

PREFIXES = {
    "lora_unet": "unet",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te": "text_encoder",
    "oft_unet": "unet",
    "lycoris": "unet",
}
_KINDS = {
    "lora": ("lora_down", "lora_up", "lora_mid", "dora_scale"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale"),
    "full": ("diff", "diff_b"),
    "ia3": ("weight", "on_input"),
    "glora": ("a1", "a2", "b1", "b2", "bm"),
    "oft": ("oft_blocks", "rescale"),
    "boft": ("oft_blocks", "rescale"),
}
"""Kind of delta → its leaves. Those of LoRA and GLoRA stand for layers and end in ``.weight``; the others are bare."""

_LEAVES = {"alpha", *(leaf for leaves in _KINDS.values() for leaf in leaves)}
_LAYERS = {*_KINDS["lora"], *_KINDS["glora"]} - {LEAF}
_BEGINS = [f"{prefix}_" for prefix in PREFIXES]
_ENDINGS = [f".{leaf}.weight" if leaf in _LAYERS else f".{leaf}" for leaf in sorted(_LEAVES)]
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


_XL = Blocks(2, (False, True, True))
_ANY = Blocks(2, (True, True, True, True))
"""For reading: how the original's numbers come back does not depend on where the attentions are."""
_ORIGINAL = ("input_blocks.", "output_blocks.", "middle_block.", "time_embed.", "label_emb.", "out.")


def flat(path: str) -> str:
    """A module's path as these names have it."""
    return path.replace(".", "_")


def dotted(name: str) -> str:
    """The path again: ``mid_block_attentions_0_proj_in`` → ``mid_block.attentions.0.proj_in``."""
    return ".".join(found.removesuffix("_") for found in _SEGMENT.findall(name))


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the keys look like this dialect."""
    return any(key.startswith(tuple(f"{prefix}_" for prefix in PREFIXES)) and "." in key for key in tensors)


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Adapter:
    """Every key is used, or named in a ValueError."""
    modules: dict[str, dict[str, Tensor]] = {}
    bundled: dict[str, Tensor] = {}
    stilled: set[str] = set()
    """Modules whose rotations kohya's OFT bounds by 0, which in LyCORIS' files means no bound"""
    for key, value in tensors.items():
        if embedding.is_bundled(key):
            bundled[key] = value
            continue
        name, _, leaf = key.partition(".")
        prefix = next((prefix for prefix in PREFIXES if name.startswith(f"{prefix}_")), None)
        leaf = leaf.removesuffix(".weight")
        leaf = next((ours for ours, theirs in _OF_NORMS.items() if leaf == theirs), leaf)
        if prefix is None or leaf not in _LEAVES:
            raise UnknownKeyError(key, f"<prefix>_<module>.<leaf> of {', '.join(_KINDS)}", _BEGINS, _ENDINGS)
        path = _path(prefix, dotted(name.removeprefix(f"{prefix}_")))
        modules.setdefault(path, {})[leaf] = value
        if prefix == "oft_unet" and leaf == "alpha" and not value.any():
            stilled.add(path)
    deltas: dict[str, tuple[Delta, ...]] = {}
    for path, leaves in modules.items():
        alpha = leaves.pop("alpha", None)
        if path in stilled:
            leaves = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        kind = next((kind for kind, names in _KINDS.items() if leaves and set(leaves) <= set(names)), None)
        if kind is None:
            raise ValueError(f"{path} has the leaves {', '.join(sorted(leaves)) or 'alpha alone'}: of no one method")
        try:
            delta = read_delta(kind, leaves, None if alpha is None else number(alpha.float().item()))
            deltas[path] = (delta,)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"the factors of {path} do not fit together: {error}") from error
    if not deltas:
        raise ValueError("it holds words alone, which these files only bring along with weights")
    tokens = embedding.read(bundled, {}).tokens if bundled else {}
    said = {"method": _method(deltas, bool(tokens))}
    if any(LEAF in delta.leaves for found in deltas.values() for delta in found):
        said["dora"] = LYCORIS
    return Adapter(deltas, told(header, **said), tokens=tokens)


def _path(prefix: str, inside: str) -> str:
    """The module's path in adapters, from the prefix and what stands behind it, with dots."""
    part = PREFIXES[prefix]
    if prefix == "lycoris" and inside.startswith(_OF_TEXT):
        part = "text_encoder"
    if part == "unet" and inside.startswith(_ORIGINAL):
        inside = _ANY.diffusers(inside)
    return f"{part}.{inside.removeprefix('text_model.')}"


def _method(deltas: Mapping[str, tuple[Delta, ...]], with_words: bool) -> str:
    """What made a file that does not say: LoRA on convolutions is called LoCon."""
    if with_words:
        return "pivotal"
    kinds = {delta.kind for found in deltas.values() for delta in found}
    if kinds != {"lora"}:
        return next(iter(kinds)) if len(kinds) == 1 else "mixed"
    wide = (leaf for found in deltas.values() for name, leaf in found[0].leaves.items() if name != LEAF)
    return "locon" if any(leaf.ndim == 4 and leaf.shape[2:] != (1, 1) for leaf in wide) else "lora"


def _lengths(leaf: Tensor, delta: Delta) -> Tensor:
    """``dora_scale`` [out, 1, …], as files have it: those that were trained here are [out]."""
    return leaf.view(-1, *[1] * (delta.leaves["lora_down"].ndim - 1)) if leaf.ndim == 1 else leaf


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header. Raises ValueError where a module holds something that has no name here."""
    if not adapter.deltas:
        raise ValueError("it holds no weights, and these files are for weights, with or without words")
    two_encoders = any(path.startswith("text_encoder_2.") for path in adapter.deltas)
    base = adapter.metadata.get("base")
    is_xl = two_encoders or (isinstance(base, Mapping) and base.get("family") == "sdxl")
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if is_xl else "lora_te", "text_encoder_2": "lora_te2"}
    tensors: dict[str, Tensor] = {}
    for path, found in adapter.deltas.items():
        part, _, inside = path.partition(".")
        if is_xl and part == "unet":
            inside = _XL.original(inside)
        if part not in prefixes or dotted(flat(inside)) != inside:
            raise ValueError(f"the path {path} cannot be told apart in names with underscores")
        if len(found) != 1 or found[0].kind not in _KINDS:
            raise ValueError(f"{path} holds no single delta of {', '.join(_KINDS)}")
        delta, start = found[0], f"{prefixes[part]}_{flat(inside if part == 'unet' else leveled(inside))}"
        of_norm = delta.kind == "full" and delta.leaves["diff"].ndim == 1
        for name, leaf in delta.leaves.items():
            column = _lengths(leaf, delta) if name == LEAF else leaf
            key = f"{start}.{_OF_NORMS[name] if of_norm else name}"
            tensors[key + (".weight" if name in _LAYERS else "")] = column.contiguous()
        if delta.alpha is not None:
            tensors[f"{start}.alpha"] = torch.tensor(float(delta.alpha))
    for word, vectors in adapter.tokens.items():
        if set(vectors) == {"text_encoder"}:
            tensors[f"bundle_emb.{word}.string_to_param.*"] = vectors["text_encoder"].contiguous()
        else:
            keys = {part: key for key, part in embedding.PARTS.items()}
            tensors |= {f"bundle_emb.{word}.{keys[part]}": value.contiguous() for part, value in vectors.items()}
    return tensors, {"format": "pt", **write_ours(adapter)}
