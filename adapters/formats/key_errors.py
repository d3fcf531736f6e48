"""Help with unknown keys and module names: the nearest known key, and the base that the rest of a file fits."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache

from torch import Tensor

from diffgraft.adapters.dialect import Read
from diffgraft.adapters.formats.original_names import is_known
from diffgraft.adapters.ops.effect import fitting_bases
from diffgraft.bases.layout_names import layouts
from diffgraft.bases.registry import families
from diffgraft.errors import did_you_mean

_SIMILAR = 0.7
"""Similarity from which an unknown beginning of a key is taken for a misspelled known one"""
_MAX_DROPPED = 20
"""Maximum number of modules with unknown keys that are dropped to see which base the others fit"""
_NAMES = """
down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks attn1 attn2 ff net proj
proj_in proj_out to_q to_k to_v to_out norm norm1 norm2 norm3 group_norm conv conv1 conv2 conv_in conv_out conv_norm_out
conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2
embeddings token_embedding position_embedding encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2
layer_norm1 layer_norm2 final_layer_norm text_projection
word_embeddings position_embeddings token_type_embeddings layer attention self query key value output dense intermediate
pooler LayerNorm
block SelfAttention DenseReluDense q k v o wi wi_0 wi_1 wo shared relative_attention_bias layer_norm
"""
"""Names of modules in the UNets and text encoders known here: those of CLIP, BERT and T5"""
_PARTS = frozenset(("unet", "text_encoder", "text_encoder_2"))
"""Networks of the bases whose names of modules these are; names of transformers are known by their layouts"""
_TRANSFORMERS = re.compile(
    r"(base_model\.model\.)?(transformer\.|diffusion_model\.(?!input_|output_|middle_block|time_embed|label_emb|out\.))"
    r"|lora_(transformer|te3)_"
    r"|(lora_unet|lycoris)_(double|single|joint)_blocks?_"
)
"""Beginnings of keys in adapters for transformers: Stable Diffusion 3, Flux, and video models"""
_PREFIX = re.compile(
    r"(transformer\.)?base_model\.model\.((transformer|diffusion_model)\.)?"
    r"|(lora_)?transformer[._]|(model\.)?diffusion_model\.|lora_unet[._]|lycoris_"
)
"""Beginning of a key, before the name of a layer in a transformer"""


class UnknownKeyError(ValueError):
    """A key of a file that its dialect does not know.

    Args:
        key: the unknown key.
        expected: description of the keys that the dialect has.
        begins: known beginnings of keys, each ending in ``.`` or ``_``.
        endings: known endings of keys, each starting with ``.``; with both, the message names the nearest known key.
    """

    def __init__(self, key: str, expected: str, begins: Sequence[str] = (), endings: Sequence[str] = ()) -> None:
        self.key = self.module = key
        hint = ""
        begin = max(begins, key=lambda known: _similarity(known, _beginning(key, known)), default="")
        if begin and _similarity(begin, _beginning(key, begin)) > _SIMILAR:
            middle = key.removeprefix(_beginning(key, begin))
            stems = {ending: begin + middle.removesuffix(_ending(middle, ending)) for ending in endings}
            others = (ending for ending, stem in stems.items() if stem + ending != key)
            ending = max(others, key=lambda known: (_similarity(known, _ending(middle, known)), len(known)))
            self.module = stems[ending]
            """Beginning of the keys of the module that the key probably belongs to"""
            hint = f"; the nearest known key is {self.module}{ending}"
        super().__init__(f"unknown key {key}: expected {expected}{hint}")


def _beginning(key: str, like: str) -> str:
    """The beginning of `key` with as many words as `like` has; the last character of `like` separates words."""
    words = key.split(like[-1], like.count(like[-1]))
    return key[: len(key) - len(words[-1])] if len(words) > 1 else ""


def _ending(key: str, like: str) -> str:
    """The end of `key` with as many words as `like` has, each with the dot before it."""
    words = key.rsplit(".", like.count("."))
    return key[len(words[0]) :]


def _similarity(first: str, second: str) -> float:
    return SequenceMatcher(None, first, second).ratio()


def describe_fitting_bases(
    read: Read, tensors: Mapping[str, Tensor], header: Mapping[str, str], error: UnknownKeyError
) -> str:
    """Half-sentence on the known bases that the modules without unknown keys fit; empty if they fit none."""
    remaining = dict(tensors)
    for _ in range(_MAX_DROPPED):
        module = f"{error.module}."
        remaining = {key: value for key, value in remaining.items() if key != error.key and not key.startswith(module)}
        try:
            bases = fitting_bases(read(remaining, header, None).deltas) if remaining else []
        except UnknownKeyError as another:
            error = another
        except ValueError:
            break
        else:
            return f", and its other modules are those of {', '.join(bases)}" if bases else ""
    return ""


def describe_unknown_modules(paths: Sequence[str]) -> str:
    """Sentence on modules with names that no known base has, if most modules have known names; else empty.

    It is also empty for adapters of denoisers whose original layout is not known.
    """
    known = _known_words()
    unknown = [path for path in paths if not known.issuperset(_words(path))]
    if not _PARTS.issuperset(path.partition(".")[0] for path in paths):
        return ""
    if not unknown or 2 * len(unknown) > len(paths):
        return ""
    word = next(word for word in _words(unknown[0]) if word not in known)
    return f"no known base has {len(unknown)} of its modules, such as {unknown[0]}; {did_you_mean(word, known)}"


@cache
def _known_words() -> frozenset[str]:
    """Names of modules in all known bases."""
    layers = (path for layout in layouts().values() for layer in layout.layers for path in layer.layers)
    return frozenset(_NAMES.split()).union(word for path in layers for word in _words(f".{path}"))


def _words(path: str) -> list[str]:
    return [word for word in path.split(".")[1:] if not word.isdecimal()]


def is_for_unknown_transformer(keys: Iterable[str]) -> bool:
    """Whether the keys are for a base with a transformer as denoiser, and none is that of a layer in a known family."""
    keys = list(keys)
    without_table = tuple(f"{family.denoiser}." for family in families().values() if family.original is None)
    if not any(_TRANSFORMERS.match(key) and not key.startswith(without_table) for key in keys):
        return False
    return not any(is_known(name) for key in keys for name in _beginnings(_PREFIX.sub("", key, count=1)))


def _beginnings(key: str) -> Iterable[str]:
    """What precedes each of the dots in a key."""
    return (key[: dot.start()] for dot in re.finditer(r"\.", key))
