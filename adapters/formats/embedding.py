"""Textual inversion files: words, and no weights.

A file of one text encoder is ``{word: [n, width]}``, as diffusers writes it (``learned_embeds.safetensors``) and webui
and ComfyUI read it. Other tools leave the word out, and it is the name of the file: ``emb_params`` (sd-scripts, and the
only one that InvokeAI reads), ``emp_params`` (OneTrainer), ``*``, and ``string_to_param.*`` (webui's ``.pt``). Two text
encoders are a pair of keys: ``clip_l`` [n, 768] and ``clip_g`` [n, 1280], or ``text_encoders_0`` and
``text_encoders_1`` (the scripts of SDXL training that write ``embeddings.pti``); either may stand alone.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats.header import OURS, read_json, read_metadata, write_ours
from diffgraft.adapters.formats.reader import STEM

PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""Key in files of two text encoders → the encoder."""
NAMELESS: Mapping[str, str] = {
    "string_to_param.*": "text_encoder",
    "emb_params": "text_encoder",
    "emp_params": "text_encoder",
    "*": "text_encoder",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
    **PARTS,
}
"""Key that does not name the word → the text encoder that its vectors are for."""
_UNDER_WORD = re.compile(r"string_to_param\.(?P<word>.+)")
_BUNDLED = re.compile(r"bundle_emb\.(?P<word>.+?)\.(?P<key>string_to_param\..+|[^.]+)")
"""Words that adapter files bring along, by LyCORIS and OneTrainer"""
_MARKED = re.compile(r"<.+>")
"""Words that look like words of textual inversion; several may lie in one file"""
_IDS = re.compile(r"(placeholder_)?string_to_token\..+|string_to_param_dict\..+")
"""Ids that a word had in the tokenizer of the tool that trained it; no other tokenizer has them"""
_WIDTH_OF_BIG_G = 1280
"""Width of vectors for OpenCLIP's bigG, which is the second text encoder wherever it is one; diffusers' scripts for XL
write them into a file of their own, ``learned_embeds_2.safetensors``, under the word alone"""
_OF_FIRST = ("clip_l", "text_encoders_0")
_OUTPUTS = ("emp_params_out", "clip_l_out", "clip_g_out")
"""OneTrainer's vectors for the output of a text encoder"""


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether a key is known for such files, or all are words with vectors."""
    vectors = {key: value for key, value in tensors.items() if not _IDS.fullmatch(key)}
    known = (*NAMELESS, *_OUTPUTS)
    if any(key in known or _UNDER_WORD.fullmatch(key) or is_bundled(key) for key in vectors):
        return True
    plain = all(key and "." not in key and value.ndim in (1, 2) for key, value in vectors.items())
    return bool(vectors) and plain and (len(vectors) == 1 or all(_MARKED.fullmatch(key) for key in vectors))


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Words by text encoder.

    Raises:
        ValueError: a tensor is no list of vectors, is of no known kind, or comes twice.
    """
    ours = read_json(header, OURS)
    of_file = str(ours.get("trigger") or header.get(STEM, "<word>"))
    tokens: dict[str, dict[str, Tensor]] = {}
    nameless = next((key for key in tensors if key in NAMELESS), None)
    for key, value in tensors.items():
        if _IDS.fullmatch(key):
            continue
        word, part = placed(key, of_file)
        if nameless and word == key and key not in NAMELESS and not _MARKED.fullmatch(key):
            known = ", ".join(NAMELESS)
            raise ValueError(f"its key {key} is for no text encoder that is known here: beside {nameless} are {known}")
        if part == "text_encoder" and value.shape[-1:] == (_WIDTH_OF_BIG_G,) and not key.endswith(_OF_FIRST):
            part = "text_encoder_2"
        if value.ndim not in (1, 2) or 0 in value.shape or not value.is_floating_point():
            raise ValueError(f"its key {key} is {list(value.shape)} of {value.dtype}, which is no list of vectors")
        vectors = tokens.setdefault(word, {})
        if part in vectors:
            raise ValueError(f"its key {key} holds a second set of vectors of the word {word!r} for {part}")
        vectors[part] = value if value.ndim == 2 else value.unsqueeze(0)
    if not tokens:
        raise ValueError("it holds ids of tokens and no vectors")
    return Adapter({}, read_metadata(header, method="textual-inversion", trigger=next(iter(tokens))), tokens=tokens)


def is_bundled(key: str) -> bool:
    """Whether `key` is that of a word which an adapter file brings along."""
    return _BUNDLED.fullmatch(key) is not None


def placed(key: str, of_file: str) -> tuple[str, str]:
    """The word and the text encoder that the vectors under `key` are for.

    Args:
        key: of a tensor.
        of_file: the word that keys without one stand for.

    Raises:
        ValueError: they are vectors for another place, or the key has levels and is of no known kind.
    """
    if found := _BUNDLED.fullmatch(key):
        inner = "string_to_param.*" if _UNDER_WORD.fullmatch(found["key"]) else found["key"]
        if inner not in (*NAMELESS, *_OUTPUTS):
            known = ", ".join(NAMELESS)
            raise ValueError(f"its key {key} ends in {inner}; known for words in bundles are {known}")
        return placed(inner, found["word"])
    if key in _OUTPUTS:
        raise ValueError(
            f"its key {key} holds vectors for the output of a text encoder (an output embedding of OneTrainer), which "
            "no pipeline has a place for: train the word with output embedding switched off"
        )
    if key in NAMELESS:
        return of_file, NAMELESS[key]
    if found := _UNDER_WORD.fullmatch(key):
        return found["word"], "text_encoder"
    if "." in key or not key:
        raise ValueError(f"its key {key} is none of a textual inversion file")
    return key, "text_encoder"


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header, with the word as the key where there is one text encoder.

    Raises:
        ValueError: there is more, or less, than one word.
    """
    word, vectors = _only_word(adapter)
    if set(vectors) == {"text_encoder"}:
        return {word: vectors["text_encoder"].contiguous()}, {"format": "pt", **write_ours(adapter)}
    return _write_by_encoder(adapter, word, vectors)


def write_nameless(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file whose name is the word in other tools: what webui, ComfyUI and InvokeAI all read.

    Raises:
        ValueError: there is more, or less, than one word.
    """
    word, vectors = _only_word(adapter)
    if set(vectors) != {"text_encoder"}:
        return _write_by_encoder(adapter, word, vectors)
    header = {"format": "pt", **write_ours(_with_trigger(adapter, word))}
    return {"emb_params": vectors["text_encoder"].contiguous()}, header


def _only_word(adapter: Adapter) -> tuple[str, Mapping[str, Tensor]]:
    if adapter.deltas or len(adapter.tokens) != 1:
        raise ValueError(
            f"it holds {len(adapter.deltas)} modules and {len(adapter.tokens)} words; it can be one word alone: "
            "--only WORD takes it out"
        )
    ((word, vectors),) = adapter.tokens.items()
    return word, vectors


def _write_by_encoder(
    adapter: Adapter, word: str, vectors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    if strange := set(vectors) - set(PARTS.values()):
        raise ValueError(f"the word has vectors for {', '.join(sorted(strange))}, for which these files have no key")
    tensors = {key: vectors[part].contiguous() for key, part in PARTS.items() if part in vectors}
    return tensors, {"format": "pt", **write_ours(_with_trigger(adapter, word))}


def _with_trigger(adapter: Adapter, word: str) -> Adapter:
    """The adapter with `word` as the trigger in its metadata, as the file's keys do not name it."""
    return replace(adapter, metadata={"method": "textual-inversion", **adapter.metadata, "trigger": word})


DIALECT = Dialect(
    name="embedding",
    summary="a word alone, as textual inversion files hold it",
    order=60,
    recognises=recognises,
    read=read,
    write=write,
    auto=10,
)
