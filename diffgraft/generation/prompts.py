"""Warnings about prompts: syntax of other programs that has no meaning here, and text beyond the encoder's limit."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from diffgraft.bases.tokens import truncated_text

_SYNTAX = {
    r"<(lora|lyco|hypernet):[^<>]*>": "give adapters by --adapter (in Python, by graft)",
    r"\([^()]+:\s*-?\d*\.?\d+\s*\)": "weights of words are not supported",
    r"\[[^\[\]]*(:[^\[\]]*:?|\|)[^\[\]]*\]": "prompts that change between steps are not supported",
    r"\{[^{}]*\|[^{}]*\}": "choices between words are not supported",
    r"\bBREAK\b": "prompts are not split at it",
    r"\bembedding:\S+": "write the word alone, without embedding:",
    r"__[\w/*-]+__": "wildcards are not supported",
}
"""Regular expression of a syntax → what to know about it here"""


def unread_syntax(prompts: Sequence[str]) -> Iterator[str]:
    """Yield a warning for each kind of webui or ComfyUI syntax in `prompts`, quoting its first occurrence."""
    for pattern, hint in _SYNTAX.items():
        first = next((match for prompt in prompts if (match := re.search(pattern, prompt))), None)
        if first is not None:
            yield f"{first[0]} in a prompt has no special meaning and is drawn as plain text: {hint}."


def truncation_warnings(tokenizer: Any, prompts: Sequence[str]) -> Iterator[str]:
    """Yield a warning about the first prompt that is longer than the text encoder reads, if any."""
    for prompt in prompts:
        if truncated := truncated_text(tokenizer, prompt):
            yield f"The prompt is too long for this base, which never sees: {truncated}"
            return
