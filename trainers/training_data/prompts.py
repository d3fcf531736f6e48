"""Prompts of training images, made of captions, templates and triggers, with warnings about likely mistakes."""

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from diffgraft.bases.tokens import truncated_text
from diffgraft.data.captions import PromptBuilder, caption_lines, mentions
from diffgraft.data.inventory import list_names
from diffgraft.data.pictures import Picture
from diffgraft.errors import DiffgraftError, shorten
from diffgraft.trainers.recipe.groups import DataSettings
from diffgraft.trainers.recipe.recipe import StyleData
from diffgraft.trainers.training_data.templates import TEMPLATES

ImagePrompts = Sequence[tuple[DataSettings, Picture, PromptBuilder]]
"""For each image: the settings of its concept, the image, and the builder of its prompts"""
_SYNTAX = {
    "alternatives in braces, {a|b}": re.compile(r"\{[^{}]*\|[^{}]*\}"),
    "weights in brackets, (word:1.3)": re.compile(
        r"(?<!\\)[(\[][^()\[\]]+:\s*\d*\.?\d+[)\]]|(?<!\\)(\(\([^()]+\)\)|\[\[[^\[\]]+\]\])"
    ),
    "adapters, <lora:name:1>": re.compile(r"<(lora|lyco|hypernet):[^<>]+>"),
    "placeholders without a value": re.compile(r"\{\s*\w+\s*\}|__[\w/-]+__"),
}
"""Name of a prompt syntax of image generators, which training does not interpret → its pattern"""


def prompt_builders(concept: DataSettings, picture: Picture) -> tuple[PromptBuilder, PromptBuilder]:
    """Builders of an image's prompts and of its class prompts, with a class text for each text."""
    captions = captions_of(concept, picture)
    if not captions:
        texts = TEMPLATES[concept.templates] if concept.templates != "none" else (concept.prompt,)
        prompts = tuple(_with_trigger(concept, concept.fill(text)) for text in texts)
        pairs = [(prompt, text) for prompt in prompts for text in _class_texts(concept, None)]
        prompts, class_prompts = zip(*pairs, strict=True)
        return PromptBuilder(prompts, kept_word=concept.trigger), PromptBuilder(class_prompts)
    pairs = [(caption, text) for caption in captions for text in _class_texts(concept, caption)]
    captions, class_prompts = zip(*pairs, strict=True)
    own_template = _caption_template(concept)
    templates = tuple("{caption}" if mentions(caption, concept.trigger) else own_template for caption in captions)
    return PromptBuilder(captions, templates, concept.trigger), PromptBuilder(class_prompts)


def _class_texts(concept: DataSettings, caption: str | None) -> list[str]:
    """Class prompts of an image's text, one for each turn; by pictures, `prior.prompts` are those of class images."""
    text, prior = concept.class_text(caption), concept.prior_preservation
    return concept.class_variants(text) if prior is not None and prior.by == "prediction" else [text]


def captions_of(concept: DataSettings, picture: Picture) -> tuple[str, ...]:
    """Captions of an image with their placeholders filled; empty if the recipe uses no captions."""
    if not concept.captions.use:
        return ()
    separator = concept.tags.separator
    lines = (line for text in picture.captions for line in caption_lines(text, concept.captions.lines, separator))
    return tuple(dict.fromkeys(_filled(concept, line) for line in lines))


def _filled(concept: DataSettings, caption: str) -> str:
    """A caption with `{trigger}` and `{subject}` replaced."""
    filled = caption.replace("{trigger}", concept.trigger)
    return filled.replace("{subject}", concept.noun) if concept.noun else filled


def _with_trigger(concept: DataSettings, prompt: str) -> str:
    """A prompt with the trigger prepended if it lacks it and the recipe has `insert_trigger`; not for captions."""
    if not concept.insert_trigger or mentions(prompt, concept.trigger):
        return prompt
    return f"{concept.trigger}{concept.tags.separator} {prompt}" if prompt.strip() else concept.trigger


def _caption_template(concept: DataSettings) -> str:
    """Template with `{caption}` for captions that lack the trigger."""
    if concept.insert_trigger:
        return f"{concept.trigger}{concept.tags.separator} {{caption}}"
    return concept.fill(concept.caption) if isinstance(concept, StyleData) else "{caption}"


def check_prompts(long_prompts: str, prompts: ImagePrompts, tokenizer: Any) -> None:
    """Warn of prompts that are too long, lack the trigger, or have several lines or a generator's syntax.

    Raises:
        DiffgraftError: a prompt is too long, and the recipe has `long_prompts=refuse`.
    """
    _check_lengths(long_prompts, prompts, tokenizer)
    for message in (*_trigger_warnings(prompts), *_line_warnings(prompts), *_syntax_warnings(prompts)):
        warnings.warn(message, stacklevel=5)


def _check_lengths(long_prompts: str, prompts: ImagePrompts, tokenizer: Any) -> None:
    if long_prompts == "chunk":
        return
    truncated = {prompt: "" for _, _, builder in prompts for prompt in builder.prompts()}
    truncated = {prompt: truncated_text(tokenizer, prompt) for prompt in truncated}
    cut_texts = {
        picture.name: text
        for _, picture, builder in prompts
        for prompt in builder.prompts()
        if (text := truncated[prompt])
    }
    if not cut_texts:
        return
    name, text = next(iter(cut_texts.items()))
    problem = f"The prompt of {list_names(list(cut_texts))} is too long"
    if long_prompts == "refuse":
        raise DiffgraftError(
            f"{problem}; the end of that of {name} would be cut off: {shorten(text)}. Shorten it, or set "
            "long_prompts=chunk."
        )
    warnings.warn(
        f"{problem}; its end is cut off: {shorten(text)}. Set long_prompts=chunk to encode it in chunks.", stacklevel=6
    )


def _trigger_warnings(prompts: ImagePrompts) -> Iterator[str]:
    """Warn of prompts without the trigger."""
    captions: dict[str, list[str]] = {}
    others: dict[tuple[str, str], int] = {}
    for concept, picture, builder in prompts:
        without = [prompt for prompt in builder.prompts() if not mentions(prompt, concept.trigger)]
        if without and captions_of(concept, picture):
            captions.setdefault(concept.trigger, []).append(picture.name)
        elif without and without[0].strip():
            key = (concept.trigger, without[0])
            others[key] = others.get(key, 0) + 1
    for trigger, names in captions.items():
        yield f"The caption of {list_names(names)} lacks the trigger {trigger!r}. insert_trigger=true prepends it."
    for (trigger, prompt), count in others.items():
        yield (
            f"The prompt of {count} {'image' if count == 1 else 'images'} without a caption, {prompt!r}, lacks the "
            f"trigger {trigger!r}. insert_trigger=true prepends it; or set trigger to a word in the prompt."
        )


def _line_warnings(prompts: ImagePrompts) -> Iterator[str]:
    """Warn of captions with several lines, not all of which may be used."""
    names_by_mode: dict[str, list[str]] = {}
    for concept, picture, _ in prompts:
        if concept.captions.use and any(len(caption_lines(text, "random")) > 1 for text in picture.captions):
            names_by_mode.setdefault(concept.captions.lines, []).append(picture.name)
    effects = {
        "first": "the first is the prompt (captions.lines=random uses each in turn, join all of them)",
        "random": "each is a prompt of its own, used in turn",
        "join": "they are joined to one prompt",
    }
    for mode, names in names_by_mode.items():
        yield f"The caption of {list_names(names)} has several lines: {effects[mode]}."


def _syntax_warnings(prompts: ImagePrompts) -> Iterator[str]:
    """Warn of captions with the prompt syntax of image generators."""
    for syntax, pattern in _SYNTAX.items():
        names = [
            picture.name
            for concept, picture, builder in prompts
            if captions_of(concept, picture) and any(pattern.search(text) for text in builder.texts)
        ]
        if names:
            yield (
                f"The caption of {list_names(names)} has {syntax}: training does not interpret it, but reads it as "
                "words."
            )
