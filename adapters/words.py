"""New words in live tokenizers and text encoders, every other row of their tables untouched.

The table of a text encoder is not resized: a module is put before it that answers for the new ids and asks the table
for all others. The tokenizer is a copy of the old one, which comes back.
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

"""Text encoder → its tokenizer, as attributes of a base or a pipeline."""
_INNER = "⟨{}⟩"
"""Name of the token with an id that belongs to a taught word."""


def expanded(tokenizer: Any, words: Mapping[str, int]) -> Any:
    """A copy of `tokenizer` that reads each of `words` as so many new tokens, with consecutive ids in that order.

    The expansion is a step of the tokenizer's own normaliser, so that whoever tokenises a prompt (a diffusers
    pipeline, training, a count of tokens) gets all vectors of a word, before anything is cut. Capitals do not matter,
    as they do not for other words of CLIP; a word is not found inside a longer one. The new tokens have names that
    nobody types, unlike diffusers' ``<dog>_1``, which a pipeline replaces in the text of the prompt, inside of other
    words too, and not at all where the word has capitals.

    Args:
        tokenizer: one of transformers', backed by the library ``tokenizers``.
        words: word → number of its vectors.
    """
    from tokenizers import AddedToken, Regex, normalizers

    grown, first = copy.deepcopy(tokenizer), len(tokenizer)
    tokens: dict[str, str] = {}
    for word, count in words.items():
        tokens[word] = " ".join(_INNER.format(first + number) for number in range(count))
        first += count
    grown.add_tokens([AddedToken(name, normalized=True) for names in tokens.values() for name in names.split()])
    replacements = [
        normalizers.Replace(Regex(_pattern(word)), tokens[word]) for word in sorted(words, key=len, reverse=True)
    ]
    steps = [normalizers.NFC(), *replacements, grown.backend_tokenizer.normalizer]
    grown.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    return grown


def _pattern(word: str) -> str:
    """Regular expression that finds `word` whatever its capitals, but not as a part of a longer word."""
    text = unicodedata.normalize("NFC", word)
    before = r"(?<!⟨)" + (r"(?<!\w)" if re.match(r"\w", text) else "")
    after = (r"(?!\w)" if re.search(r"\w$", text) else "") + r"(?!⟩)"
    return f"(?i){before}{re.escape(text)}{after}"


def _is_taught(tokenizer: Any, word: str) -> bool:
    """Whether it is written out as tokens that were added to the tokenizer."""
    return set(tokenizer.tokenize(word)) <= set(tokenizer.added_tokens_encoder) - set(tokenizer.all_special_tokens)


def _is_known(tokenizer: Any, word: str) -> bool:
    """Whether it is one token of the vocabulary, on its own or with a mark that a word ends (or begins) there."""
    tokens = tokenizer.tokenize(word)
    return word in tokenizer.get_vocab() or (len(tokens) == 1 and tokens != [tokenizer.unk_token])


class ExtendedEmbedding(nn.Module):
    """A table of embeddings, and rows of its own behind it."""

    def __init__(self, table: nn.Module, first: int, rows: nn.Parameter) -> None:
        super().__init__()
        self.table, self._first = table, first
        # one level down, so that the first parameter of the encoder, by which its precision is told, stays the table's
        self.grown = nn.ParameterList([rows])

    @property
    def rows(self) -> Tensor:
        """What stands in the new rows, [new words, width]."""
        rows: Tensor = self.grown[0]
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [n, tokens] → embeddings [n, tokens, width]."""
        old: Tensor = self.table(ids.clamp(max=self._first - 1))
        new = self.rows.to(old.dtype)[(ids - self._first).clamp(min=0, max=len(self.rows) - 1)]
        return torch.where((ids >= self._first).unsqueeze(-1), new, old)


class AddedTokens:
    """Words that a base or a pipeline knows until `remove`."""

    def __init__(self, target: Any, words: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Teach `words`: word → text encoder → vectors [n, width].

        Raises:
            DiffgraftError: a word is known already, the target has no such text encoder, or its width is another.
        """
        self._target = target
        self._encoders: list[tuple[nn.Module, nn.Module, ExtendedEmbedding]] = []
        self._tokenizers: list[tuple[str, Any]] = []
        self.rows: dict[str, nn.Parameter] = {}
        """Text encoder → its new rows [vectors, width], in the order of the words."""
        parts = dict.fromkeys(part for vectors in words.values() for part in vectors)
        plans = [(part, *self._plan(part, words)) for part in parts]
        for part, encoder, tokenizer, rows in plans:
            grown_tokenizer = expanded(tokenizer, {word: len(vectors[part]) for word, vectors in words.items()})
            table = encoder.get_input_embeddings()
            own = nn.Parameter(rows.to(next(encoder.parameters()).device))
            grown = ExtendedEmbedding(table, len(tokenizer), own)
            encoder.set_input_embeddings(grown)
            setattr(target, tokenizers()[part], grown_tokenizer)
            self._encoders.append((encoder, table, grown))
            self._tokenizers.append((tokenizers()[part], tokenizer))
            self.rows[part] = own

    def _plan(self, part: str, words: Mapping[str, Mapping[str, Tensor]]) -> tuple[Any, Any, Tensor]:
        encoder, tokenizer = getattr(self._target, part, None), getattr(self._target, tokenizers()[part], None)
        if encoder is None or tokenizer is None:
            raise DiffgraftError(f"It has words for {part}, which this base does not have, or not with its tokenizer.")
        width = encoder.config.hidden_size
        alike = Counter(word.casefold() for word in words)
        for word, vectors in words.items():
            if part not in vectors:
                raise DiffgraftError(f"The word {word!r} has no vectors for {part}, and others of the file have.")
            if _is_taught(tokenizer, word):
                raise DiffgraftError(
                    f"The word {word!r} is taught already, by an adapter that is applied here: remove that one first."
                )
            if _is_known(tokenizer, word):
                raise DiffgraftError(f"The word {word!r} is known to the base already. Choose one like '<{word}>'.")
            if alike[word.casefold()] > 1:
                raise DiffgraftError(f"The word {word!r} comes twice, and capitals do not tell words apart.")
            if vectors[part].shape[1:] != (width,):
                raise DiffgraftError(
                    f"The word {word!r} has vectors of width {vectors[part].shape[1]}, and {part} of this base has "
                    f"{width}: it was made for another family of bases."
                )
        return encoder, tokenizer, torch.cat([vectors[part].float() for vectors in words.values()])

    def remove(self) -> None:
        """Put back tables and tokenizers; doing it twice is no harm.

        Raises:
            DiffgraftError: words were taught after these, and are still there; nothing has changed then.
        """
        if any(encoder.get_input_embeddings() is not grown for encoder, _, grown in self._encoders):  # type: ignore[operator]
            raise DiffgraftError("Other words were added after these: remove those first.")
        for encoder, table, _ in self._encoders:
            encoder.set_input_embeddings(table)  # type: ignore[operator]
        for name, tokenizer in self._tokenizers:
            setattr(self._target, name, tokenizer)
        self._encoders.clear()
        self._tokenizers.clear()
