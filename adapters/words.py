"""Learned words in live tokenizers and text encoders, which leave all other rows of the embedding tables untouched.

The table of a text encoder is not resized: a module in front of it answers for the new token ids and looks up all
others in the table. The tokenizer is replaced by an extended copy, and put back later.
"""

import copy
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.bases.registry import tokenizers
from diffgraft.errors import DiffgraftError

_TOKEN_NAME = "⟨{}⟩"
"""Name of the token with an id that belongs to an added word"""


def extended_tokenizer(tokenizer: Any, words: Mapping[str, int]) -> Any:
    """Copy `tokenizer` so that it reads each of `words` as several new tokens, with consecutive ids in that order.

    The expansion is a step of the tokenizer's own normaliser, so that every user of the tokenizer (a diffusers
    pipeline, training, a count of tokens) gets all tokens of a word, before truncation. Matching ignores case, as CLIP
    does for other words; a word is not matched inside a longer one. The new tokens have names that nobody types, unlike
    diffusers' ``<dog>_1``: pipelines replace those in the text of the prompt, inside other words too, and do not
    replace them if the word has capitals.

    Args:
        tokenizer: a tokenizer of transformers that is backed by the library ``tokenizers``.
        words: word → number of its embeddings.
    """
    from tokenizers import AddedToken, Regex, normalizers

    extended, first = copy.deepcopy(tokenizer), len(tokenizer)
    tokens: dict[str, str] = {}
    for word, count in words.items():
        tokens[word] = " ".join(_TOKEN_NAME.format(first + number) for number in range(count))
        first += count
    extended.add_tokens([AddedToken(name, normalized=True) for names in tokens.values() for name in names.split()])
    replacements = [
        normalizers.Replace(Regex(_pattern(word)), tokens[word]) for word in sorted(words, key=len, reverse=True)
    ]
    own = extended.backend_tokenizer.normalizer
    steps = [normalizers.NFC(), *replacements, *([] if own is None else [own])]
    extended.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    return extended


def _pattern(word: str) -> str:
    """Regular expression that matches `word` in any case, but not as a part of a longer word."""
    text = unicodedata.normalize("NFC", word)
    before = r"(?<!⟨)" + (r"(?<!\w)" if re.match(r"\w", text) else "")
    after = (r"(?!\w)" if re.search(r"\w$", text) else "") + r"(?!⟩)"
    return f"(?i){before}{re.escape(text)}{after}"


def _is_added(tokenizer: Any, word: str) -> bool:
    """Whether the word is read as tokens that were added to the tokenizer."""
    return set(tokenizer.tokenize(word)) <= set(tokenizer.added_tokens_encoder) - set(tokenizer.all_special_tokens)


def _is_known(tokenizer: Any, word: str) -> bool:
    """Whether the word is a single token of the vocabulary, possibly with the mark of a word's end or beginning."""
    tokens = tokenizer.tokenize(word)
    return word in tokenizer.get_vocab() or (len(tokens) == 1 and tokens != [tokenizer.unk_token])


class ExtendedEmbedding(nn.Module):
    """An embedding table with additional trainable rows behind it."""

    def __init__(self, table: nn.Module, first: int, rows: nn.Parameter) -> None:
        super().__init__()
        self.table, self._first = table, first
        # inside a list, so that the first parameter of the encoder, from which its dtype is read, stays the table's
        self.added = nn.ParameterList([rows])

    @property
    def rows(self) -> Tensor:
        """The additional rows [new tokens, width]."""
        rows: Tensor = self.added[0]
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [n, tokens] → embeddings [n, tokens, width]."""
        old: Tensor = self.table(ids.clamp(max=self._first - 1))
        new = self.rows.to(old.dtype)[(ids - self._first).clamp(min=0, max=len(self.rows) - 1)]
        return torch.where((ids >= self._first).unsqueeze(-1), new, old)


class AddedTokens:
    """Words added to the tokenizers and text encoders of a base or a pipeline, until `remove`."""

    def __init__(self, target: Any, words: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add `words`: word → text encoder → embeddings [n, width].

        Raises:
            DiffgraftError: a word is known already, or the target has no such text encoder, or one of another width.
        """
        self._target = target
        self._encoders: list[tuple[nn.Module, nn.Module, ExtendedEmbedding]] = []
        self._tokenizers: list[tuple[str, Any]] = []
        self.rows: dict[str, nn.Parameter] = {}
        """Text encoder → its new rows [embeddings, width], in the order of the words"""
        parts = dict.fromkeys(part for vectors in words.values() for part in vectors)
        plans = [(part, *self._check(part, words)) for part in parts]
        for part, encoder, tokenizer, rows in plans:
            new_tokenizer = extended_tokenizer(tokenizer, {word: len(vectors[part]) for word, vectors in words.items()})
            table = encoder.get_input_embeddings()
            parameter = nn.Parameter(rows.to(next(encoder.parameters()).device))
            extended = ExtendedEmbedding(table, len(tokenizer), parameter)
            encoder.set_input_embeddings(extended)
            setattr(target, tokenizers()[part], new_tokenizer)
            self._encoders.append((encoder, table, extended))
            self._tokenizers.append((tokenizers()[part], tokenizer))
            self.rows[part] = parameter

    def _check(self, part: str, words: Mapping[str, Mapping[str, Tensor]]) -> tuple[Any, Any, Tensor]:
        """Check that all words can be added to a text encoder; returns it, its tokenizer, and the rows to add."""
        encoder, tokenizer = getattr(self._target, part, None), getattr(self._target, tokenizers()[part], None)
        if encoder is None or tokenizer is None:
            raise DiffgraftError(f"The adapter has words for {part}, but this base has no {part} with a tokenizer.")
        width = encoder.config.get_text_config().hidden_size
        spellings = Counter(word.casefold() for word in words)
        for word, vectors in words.items():
            if part not in vectors:
                raise DiffgraftError(f"The word {word!r} has no embeddings for {part}, unlike other words of the file.")
            if _is_added(tokenizer, word):
                raise DiffgraftError(
                    f"The word {word!r} was already added by another adapter that is applied: remove that one first."
                )
            if _is_known(tokenizer, word):
                raise DiffgraftError(f"The word {word!r} is already known to the base. Choose one like '<{word}>'.")
            if spellings[word.casefold()] > 1:
                raise DiffgraftError(f"The word {word!r} occurs twice; words must differ in more than case.")
            if vectors[part].shape[1:] != (width,):
                raise DiffgraftError(
                    f"The word {word!r} has embeddings of width {vectors[part].shape[1]}, but {part} of this base has "
                    f"width {width}: the word was made for another family of bases."
                )
        return encoder, tokenizer, torch.cat([vectors[part].float() for vectors in words.values()])

    def remove(self) -> None:
        """Restore the original tables and tokenizers; a second call does nothing.

        Raises:
            DiffgraftError: other words were added later and are still there; in that case nothing is changed.
        """
        if any(encoder.get_input_embeddings() is not extended for encoder, _, extended in self._encoders):  # type: ignore[operator]
            raise DiffgraftError("Other words were added after these: remove those first.")
        for encoder, table, _ in self._encoders:
            encoder.set_input_embeddings(table)  # type: ignore[operator]
        for name, tokenizer in self._tokenizers:
            setattr(self._target, name, tokenizer)
        self._encoders.clear()
        self._tokenizers.clear()
