"""What is said of each picture in training, and what a person may not have meant by it."""

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from diffgraft.bases.tokens import truncated_text
from diffgraft.data.captions import PromptBuilder, caption_lines, mentions
from diffgraft.data.inventory import named
from diffgraft.data.pictures import Picture
from diffgraft.errors import DiffgraftError, shorten
from diffgraft.trainers.recipe.groups import DataSettings
from diffgraft.trainers.recipe.recipe import StyleData
from diffgraft.trainers.training_data.templates import TEMPLATES

Said = Sequence[tuple[DataSettings, Picture, PromptBuilder]]
"""The settings of its concept, and what is said of it, for each picture"""
_SYNTAX = {
    "alternatives in braces, {a|b}": re.compile(r"\{[^{}]*\|[^{}]*\}"),
    "weights in brackets, (word:1.3)": re.compile(
        r"(?<!\\)[(\[][^()\[\]]+:\s*\d*\.?\d+[)\]]|(?<!\\)(\(\([^()]+\)\)|\[\[[^\[\]]+\]\])"
    ),
    "adapters, <lora:name:1>": re.compile(r"<(lora|lyco|hypernet):[^<>]+>"),
    "placeholders that nothing fills": re.compile(r"\{\s*\w+\s*\}|__[\w/-]+__"),
}
"""What a caption may have from prompts for drawing, which training does not know"""


def wording_of(part: DataSettings, picture: Picture) -> tuple[PromptBuilder, PromptBuilder]:
    """What is said of a picture, and of its class."""
    captions = captions_of(part, picture)
    if not captions:
        texts = TEMPLATES[part.templates] if part.templates != "none" else (part.prompt,)
        said = tuple(_with_trigger(part, part.fill(text)) for text in texts)
        return PromptBuilder(said, kept_word=part.trigger), PromptBuilder((part.class_text(None),) * len(said))
    of_class = PromptBuilder(tuple(part.class_text(caption) for caption in captions))
    around = tuple("{caption}" if mentions(caption, part.trigger) else _around(part) for caption in captions)
    return PromptBuilder(captions, around, part.trigger), of_class


def captions_of(part: DataSettings, picture: Picture) -> tuple[str, ...]:
    """A picture's captions as they are used, their placeholders filled; none where the recipe wants none."""
    if not part.captions.use:
        return ()
    lines = (line for one in picture.captions for line in caption_lines(one, part.captions.lines, part.tags.separator))
    return tuple(dict.fromkeys(_filled(part, line) for line in lines))


def _filled(part: DataSettings, caption: str) -> str:
    filled = caption.replace("{trigger}", part.trigger)
    return filled.replace("{subject}", part.noun) if part.noun else filled


def _with_trigger(part: DataSettings, prompt: str) -> str:
    """A prompt that is no caption, with the trigger in front where it lacks it and the recipe wants it."""
    if not part.insert_trigger or mentions(prompt, part.trigger):
        return prompt
    return f"{part.trigger}{part.tags.separator} {prompt}" if prompt.strip() else part.trigger


def _around(part: DataSettings) -> str:
    """What a caption that lacks the trigger is put into."""
    if part.insert_trigger:
        return f"{part.trigger}{part.tags.separator} {{caption}}"
    return part.fill(part.caption) if isinstance(part, StyleData) else "{caption}"


def check_prompts(long_prompts: str, said: Said, tokenizer: Any) -> None:
    """Warn of what a person may not have meant in what is said of pictures.

    Raises:
        DiffgraftError: a prompt is too long, and the recipe refuses those.
    """
    _check_lengths(long_prompts, said, tokenizer)
    for text in (*_lacking(said), *_of_lines(said), *_of_syntax(said)):
        warnings.warn(text, stacklevel=5)


def _check_lengths(long_prompts: str, said: Said, tokenizer: Any) -> None:
    if long_prompts == "chunk":
        return
    prompts = {prompt: "" for _, _, wording in said for prompt in wording.prompts()}
    prompts = {prompt: truncated_text(tokenizer, prompt) for prompt in prompts}
    lost = {
        picture.name: words
        for _, picture, wording in said
        for prompt in wording.prompts()
        if (words := prompts[prompt])
    }
    if not lost:
        return
    name, words = next(iter(lost.items()))
    what = f"The prompt of {named(list(lost))} is too long"
    if long_prompts == "refuse":
        raise DiffgraftError(
            f"{what}; of that of {name} the base would never see: {shorten(words)}. Shorten it, or set "
            "long_prompts=chunk."
        )
    warnings.warn(
        f"{what}; the base never sees: {shorten(words)}. long_prompts=chunk has it read in pieces.", stacklevel=6
    )


def _lacking(said: Said) -> Iterator[str]:
    """Prompts without the trigger, which what is learnt will not listen to."""
    captions: dict[str, list[str]] = {}
    others: dict[tuple[str, str], int] = {}
    for part, picture, wording in said:
        without = [text for text in wording.prompts() if not mentions(text, part.trigger)]
        if without and captions_of(part, picture):
            captions.setdefault(part.trigger, []).append(picture.name)
        elif without and without[0].strip():
            key = (part.trigger, without[0])
            others[key] = others.get(key, 0) + 1
    for trigger, names in captions.items():
        yield f"The caption of {named(names)} lacks the trigger {trigger!r}. insert_trigger=true puts it in front."
    for (trigger, prompt), count in others.items():
        yield (
            f"The prompt of {count} {'picture' if count == 1 else 'pictures'} without a caption, {prompt!r}, lacks the "
            f"trigger {trigger!r}. insert_trigger=true puts it in front, or set trigger to a word that it has."
        )


def _of_lines(said: Said) -> Iterator[str]:
    """Captions of several lines, of which not all may be used."""
    long: dict[str, list[str]] = {}
    for part, picture, _ in said:
        if part.captions.use and any(len(caption_lines(one, "random")) > 1 for one in picture.captions):
            long.setdefault(part.captions.lines, []).append(picture.name)
    ways = {
        "first": "the first is the prompt (captions.lines=random takes each in turn, join all of them)",
        "random": "each is a prompt of its own, in turn",
        "join": "they are joined to one prompt",
    }
    for how, names in long.items():
        yield f"The caption of {named(names)} has several lines: {ways[how]}."


def _of_syntax(said: Said) -> Iterator[str]:
    """Captions that are written as prompts for drawing are."""
    for what, pattern in _SYNTAX.items():
        names = [
            picture.name
            for part, picture, wording in said
            if captions_of(part, picture) and any(pattern.search(text) for text in wording.texts)
        ]
        if names:
            yield f"The caption of {named(names)} has {what}: training takes them as words, as they stand."
