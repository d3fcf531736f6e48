"""Keys that a dialect has no place for: the known keys nearest to them, and the base that the rest of a file is for."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher

from torch import Tensor

from diffgraft.adapters.dialect import Read
from diffgraft.adapters.ops.effect import fitting
from diffgraft.bases.registry import part_names
from diffgraft.errors import did_you_mean

_ALIKE = 0.7
"""From this share of letters in common a beginning may have been meant as the other"""
_AT_MOST = 20
"""So many modules with unknown keys are left aside to see what the others fit."""
_NAMES = """
down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks attn1 attn2 ff net proj
proj_in proj_out to_q to_k to_v to_out norm norm1 norm2 norm3 group_norm conv conv1 conv2 conv_in conv_out conv_norm_out
conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2
embeddings token_embedding position_embedding encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2
layer_norm1 layer_norm2 final_layer_norm text_projection
word_embeddings position_embeddings token_type_embeddings layer attention self query key value output dense intermediate
pooler LayerNorm
"""
"""What modules are called in the UNets and text encoders known here: those of CLIP, and of BERT"""
_WORDS = frozenset(_NAMES.split())
_TRANSFORMERS = re.compile(
    r"(base_model\.model\.)?(transformer\.|diffusion_model\.(?!input_|output_|middle_block|time_embed|label_emb|out\.))"
    r"|lora_(transformer|te3)_"
    r"|(lora_unet|lycoris)_(double|single|joint)_blocks?_"
)
"""What keys of adapters for transformers begin with: Stable Diffusion 3, Flux, and video models."""


class UnknownKeyError(ValueError):
    """`key` is none of the keys that were `expected`.

    Where the known keys begin with one of `begins` and end in one of `endings`, the nearest is named. A beginning ends
    in ``.`` or ``_`` and an ending starts with ``.``; both may hold more of these.
    """

    def __init__(self, key: str, expected: str, begins: Sequence[str] = (), endings: Sequence[str] = ()) -> None:
        self.key = self.module = key
        near = ""
        begin = max(begins, key=lambda word: _like(word, _first(key, word)), default="")
        if begin and _like(begin, _first(key, begin)) > _ALIKE:
            middle = key.removeprefix(_first(key, begin))
            stems = {ending: begin + middle.removesuffix(_last(middle, ending)) for ending in endings}
            others = (ending for ending, stem in stems.items() if stem + ending != key)
            ending = max(others, key=lambda word: (_like(word, _last(middle, word)), len(word)))
            self.module = stems[ending]
            """What the keys of the module begin with that it may belong to"""
            near = f"; the nearest known key is {self.module}{ending}"
        super().__init__(f"its key {key} is no {expected}{near}")


def _first(key: str, like: str) -> str:
    """As many words of the beginning of `key` as `like` has, whose last sign divides words."""
    words = key.split(like[-1], like.count(like[-1]))
    return key[: len(key) - len(words[-1])] if len(words) > 1 else ""


def _last(key: str, like: str) -> str:
    """As many words of the end of `key` as `like` has, each with the dot before it."""
    words = key.rsplit(".", like.count("."))
    return key[len(words[0]) :]


def _like(one: str, two: str) -> float:
    return SequenceMatcher(None, one, two).ratio()


def made_for(read: Read, tensors: Mapping[str, Tensor], header: Mapping[str, str], error: UnknownKeyError) -> str:
    """A half-sentence on the known bases whose layers the modules without unknown keys fit; empty where none does."""
    left = dict(tensors)
    for _ in range(_AT_MOST):
        left = {
            key: value for key, value in left.items() if key != error.key and not key.startswith(f"{error.module}.")
        }
        try:
            found = fitting(read(left, header, None).deltas) if left else []
        except UnknownKeyError as another:
            error = another
        except ValueError:
            break
        else:
            return f", and its other modules are those of {', '.join(found)}" if found else ""
    return ""


def misspelt(paths: Sequence[str]) -> str:
    """A sentence on modules with names that no base known here has, where most have names that some base has."""
    strange = [path for path in paths if not _WORDS.issuperset(_words(path))]
    if not strange or 2 * len(strange) > len(paths):
        return ""
    word = next(word for word in _words(strange[0]) if word not in _WORDS)
    return (
        f"{len(strange)} of its modules are in no base known here, such as {strange[0]}; {did_you_mean(word, _WORDS)}"
    )


def _words(path: str) -> list[str]:
    return [word for word in path.split(".")[1:] if not word.isdecimal()]


def is_for_a_transformer(keys: Iterable[str]) -> bool:
    """Whether a file is for a base whose denoiser is a transformer, and no known family has a network of that name."""
    known = tuple(f"{name}." for name in part_names())
    return any(_TRANSFORMERS.match(key) and not key.startswith(known) for key in keys)
