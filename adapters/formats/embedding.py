"""Textual inversion files: learned words (tokens with their embeddings) and no weights.

A file for one text encoder is ``{word: [n, width]}``, as diffusers writes it (``learned_embeds.safetensors``) and webui
and ComfyUI read it. Other tools do not store the word, so that the file's name is the word: ``emb_params`` (sd-scripts,
and the only key that InvokeAI reads), ``emp_params`` (OneTrainer), ``*``, and ``string_to_param.*`` (webui's ``.pt``).
Files for two text encoders have a pair of keys: ``clip_l`` [n, 768] and ``clip_g`` [n, 1280], or ``text_encoders_0``
and ``text_encoders_1`` (SDXL training scripts that write ``embeddings.pti``); one of the two may be missing. T5's are
``t5xxl`` [n, 4096], beside ``clip_l`` for FLUX.1 and beside both for Stable Diffusion 3 (ComfyUI,
``comfy/text_encoders/sd3_clip.py``).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats.header import DIFFGRAFT_KEY, read_json, read_metadata, write_metadata
from diffgraft.adapters.formats.reader import FILE_STEM

_T5_KEY = "t5xxl"
PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", _T5_KEY: "text_encoder_3"}
"""Key in files of several text encoders → text encoder; without CLIP's second one, T5 is the second"""
NAMELESS: Mapping[str, str] = {
    "string_to_param.*": "text_encoder",
    "emb_params": "text_encoder",
    "emp_params": "text_encoder",
    "*": "text_encoder",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
    **PARTS,
}
"""Key that does not contain the word → text encoder that its embeddings are for"""
_WEBUI_WORD = re.compile(r"string_to_param\.(?P<word>.+)")
_BUNDLED = re.compile(r"bundle_emb\.(?P<word>.+?)\.(?P<key>string_to_param\..+|[^.]+)")
"""Keys of words inside adapter files, as LyCORIS and OneTrainer write them"""
_BRACKETED = re.compile(r"<.+>")
"""Words in angle brackets, the usual form of textual inversion; a file may hold several of them"""
_IDS = re.compile(r"(placeholder_)?string_to_token\..+|string_to_param_dict\..+")
"""Token ids that the word had in the training tool's tokenizer; they are meaningless in any other tokenizer"""
_BIG_G_WIDTH = 1280
"""Embedding width of OpenCLIP's bigG, which is always the second text encoder; diffusers' scripts for XL write its
embeddings into a separate file, ``learned_embeds_2.safetensors``, with the word as the only key"""
_FIRST_ENCODER_KEYS = ("clip_l", "text_encoders_0")
_OUTPUT_KEYS = ("emp_params_out", "clip_l_out", "clip_g_out")
"""Keys of OneTrainer's embeddings for the output of a text encoder"""


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether a key is known for such files, or all keys are words with embeddings."""
    vectors = {key: value for key, value in tensors.items() if not _IDS.fullmatch(key)}
    known = (*NAMELESS, *_OUTPUT_KEYS)
    if any(key in known or _WEBUI_WORD.fullmatch(key) or is_bundled(key) for key in vectors):
        return True
    plain = all(key and "." not in key and value.ndim in (1, 2) for key, value in vectors.items())
    return bool(vectors) and plain and (len(vectors) == 1 or all(_BRACKETED.fullmatch(key) for key in vectors))


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Build the adapter, with words by text encoder.

    Raises:
        ValueError: a tensor does not hold embeddings, its key is unknown, or a word occurs twice.
    """
    metadata = read_json(header, DIFFGRAFT_KEY)
    default_word = str(metadata.get("trigger") or header.get(FILE_STEM, "<word>"))
    tokens: dict[str, dict[str, Tensor]] = {}
    nameless = next((key for key in tensors if key in NAMELESS), None)
    t5_is_second = _T5_KEY in tensors and "clip_g" not in tensors and _family(metadata) != "sd3"
    for key, value in tensors.items():
        if _IDS.fullmatch(key):
            continue
        word, part = parse_key(key, default_word)
        if nameless and word == key and key not in NAMELESS and not _BRACKETED.fullmatch(key):
            raise ValueError(f"unknown key {key}: beside {nameless}, the known keys are {', '.join(NAMELESS)}")
        if part == "text_encoder" and value.shape[-1:] == (_BIG_G_WIDTH,) and not key.endswith(_FIRST_ENCODER_KEYS):
            part = "text_encoder_2"
        if key == _T5_KEY and t5_is_second:
            part = "text_encoder_2"
        if value.ndim not in (1, 2) or 0 in value.shape or not value.is_floating_point():
            raise ValueError(
                f"{key} has shape {list(value.shape)} and dtype {value.dtype}; expected float embeddings [n, width]"
            )
        vectors = tokens.setdefault(word, {})
        if part in vectors:
            raise ValueError(f"the key {key} is a second set of embeddings of the word {word!r} for {part}")
        vectors[part] = value if value.ndim == 2 else value.unsqueeze(0)
    if not tokens:
        raise ValueError("it holds only token ids and no embeddings")
    return Adapter({}, read_metadata(header, method="textual-inversion", trigger=next(iter(tokens))), tokens=tokens)


def bundle(tokens: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the embeddings of words by their keys inside an adapter file, for which `is_bundled` is true."""
    tensors: dict[str, Tensor] = {}
    for word, vectors in tokens.items():
        only_first = set(vectors) == {"text_encoder"}
        keys = {"text_encoder": "string_to_param.*"} if only_first else {part: key for key, part in PARTS.items()}
        tensors |= {f"bundle_emb.{word}.{keys[part]}": value.contiguous() for part, value in vectors.items()}
    return tensors


def is_bundled(key: str) -> bool:
    """Whether `key` is that of a word inside an adapter file."""
    return _BUNDLED.fullmatch(key) is not None


def parse_key(key: str, default_word: str) -> tuple[str, str]:
    """The word, and the text encoder, that the embeddings under `key` are for.

    Args:
        key: key of a tensor.
        default_word: word for keys that do not contain one.

    Raises:
        ValueError: the key is unknown, or one of embeddings for the output of a text encoder.
    """
    if match := _BUNDLED.fullmatch(key):
        inner = "string_to_param.*" if _WEBUI_WORD.fullmatch(match["key"]) else match["key"]
        if inner not in (*NAMELESS, *_OUTPUT_KEYS):
            raise ValueError(f"the key {key} ends in {inner}; keys of words in adapters end in {', '.join(NAMELESS)}")
        return parse_key(inner, match["word"])
    if key in _OUTPUT_KEYS:
        raise ValueError(
            f"the key {key} holds embeddings for the output of a text encoder (OneTrainer's output embedding), which "
            "pipelines cannot use: train the word with output embedding switched off"
        )
    if key in NAMELESS:
        return default_word, NAMELESS[key]
    if match := _WEBUI_WORD.fullmatch(key):
        return match["word"], "text_encoder"
    if "." in key or not key:
        raise ValueError(f"the key {key} is not one of textual inversion files")
    return key, "text_encoder"


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header; for one text encoder, the word is the key.

    Raises:
        ValueError: the adapter does not hold exactly one word, or holds weights.
    """
    word, vectors = _only_word(adapter)
    if set(vectors) == {"text_encoder"}:
        return {word: vectors["text_encoder"].contiguous()}, {"format": "pt", **write_metadata(adapter)}
    return _write_by_encoder(adapter, word, vectors)


def write_nameless(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header of a file whose name is the word, which webui, ComfyUI and InvokeAI all read.

    Raises:
        ValueError: the adapter does not hold exactly one word, or holds weights.
    """
    word, vectors = _only_word(adapter)
    if set(vectors) != {"text_encoder"}:
        return _write_by_encoder(adapter, word, vectors)
    header = {"format": "pt", **write_metadata(_with_trigger(adapter, word))}
    return {"emb_params": vectors["text_encoder"].contiguous()}, header


def _only_word(adapter: Adapter) -> tuple[str, Mapping[str, Tensor]]:
    if adapter.deltas or len(adapter.tokens) != 1:
        raise ValueError(
            f"it holds {len(adapter.deltas)} modules and {len(adapter.tokens)} words, but such a file holds a single "
            "word: select it with --only WORD"
        )
    ((word, vectors),) = adapter.tokens.items()
    return word, vectors


def _write_by_encoder(
    adapter: Adapter, word: str, vectors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    parts = {"clip_l": "text_encoder", _T5_KEY: "text_encoder_2"} if _family(adapter.metadata) == "flux1" else PARTS
    if unknown := set(vectors) - set(parts.values()):
        raise ValueError(f"the word has embeddings for {', '.join(sorted(unknown))}, for which these files have no key")
    tensors = {key: vectors[part].contiguous() for key, part in parts.items() if part in vectors}
    return tensors, {"format": "pt", **write_metadata(_with_trigger(adapter, word))}


def _family(metadata: Mapping[str, Any]) -> Any:
    """Return the family of the base that a file's metadata names, None without one."""
    base = metadata.get("base")
    return base.get("family") if isinstance(base, Mapping) else None


def _with_trigger(adapter: Adapter, word: str) -> Adapter:
    """Set the trigger in the metadata to `word`, as the file's keys do not contain it."""
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
