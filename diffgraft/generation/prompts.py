"""What prompts hold that means something in other programs and nothing here: told, as it is drawn as it stands."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from diffgraft.bases.tokens import truncated_text

_SYNTAX = {
    r"<(lora|lyco|hypernet):[^<>]*>": "an adapter is given by --adapter (in Python, by graft)",
    r"\([^()]+:\s*-?\d*\.?\d+\s*\)": "weights of words are not read",
    r"\[[^\[\]]*(:[^\[\]]*:?|\|)[^\[\]]*\]": "prompts that change from step to step are not read",
    r"\{[^{}]*\|[^{}]*\}": "one of several words is not chosen",
    r"\bBREAK\b": "prompts are not divided there",
    r"\bembedding:\S+": "a word is named alone, without embedding:",
    r"__[\w/*-]+__": "wildcards are not filled in",
}
"""Regular expression → what is true here"""


def unread_syntax(prompts: Sequence[str]) -> Iterator[str]:
    """One sentence for each kind of syntax of webui or ComfyUI that a prompt holds, with the first place of it."""
    for pattern, truth in _SYNTAX.items():
        found = next((match for prompt in prompts if (match := re.search(pattern, prompt))), None)
        if found is not None:
            yield f"{found[0]} in a prompt means nothing here, and is drawn as it stands: {truth}."


def cut_prompt(tokenizer: Any, prompts: Sequence[str]) -> Iterator[str]:
    """A sentence on the first prompt that is longer than the text encoder reads."""
    for prompt in prompts:
        if lost := truncated_text(tokenizer, prompt):
            yield f"The prompt is too long for this base, which never sees: {lost}"
            return
