"""Saving adapter files: what a dialect writes is read again in memory, before anything stands on the disk."""

import re
from pathlib import Path

from diffgraft.adapters.adapter import Adapter, writes_adapters
from diffgraft.adapters.dialect import Contents, Dialect
from diffgraft.adapters.formats.verify import check_contents
from diffgraft.adapters.registry import dialects, get_written_dialect
from diffgraft.errors import DiffgraftError


@writes_adapters
def save_adapter(adapter: Adapter, path: Path, dialect: str = "auto") -> Path:
    """Write `adapter` to `path` in `dialect`; `auto` is the most widely read one that can hold it.

    Raises:
        DiffgraftError: there is no such dialect, it cannot hold the adapter, or its writer leaves something out;
            nothing is written then.
    """
    if not (adapter.deltas or adapter.tokens or adapter.networks):
        raise DiffgraftError(f"There is nothing to write into {path}: the adapter changes no layer and holds no word.")
    chosen, (tensors, header) = _written(adapter, dialect)
    check_contents(adapter, tensors, header, chosen.name)
    try:
        return chosen.store(path, tensors, header)
    except ValueError as error:
        raise _cannot(dialect, error) from error


def save_words(adapter: Adapter, folder: Path) -> list[Path]:
    """Write each word of an adapter into a file of its own, beside the weights that were trained with it.

    Of the programs that open adapter files with words in them, ComfyUI, Forge and InvokeAI take the weights alone.

    Returns:
        ``adapter.<word>.safetensors`` for each, with what no file system takes left out of the word.
    """
    return [
        save_adapter(only_word(adapter, word), folder / f"adapter.{_plain(word)}.safetensors", "webui")
        for word in adapter.tokens
    ]


def only_word(adapter: Adapter, word: str) -> Adapter:
    """An adapter that teaches one of the words of `adapter`, and changes no weights."""
    metadata = {**adapter.metadata, "method": "textual-inversion", "trigger": word}
    return Adapter({}, metadata, tokens={word: adapter.tokens[word]})


def _plain(word: str) -> str:
    return re.sub(r"[^\w.-]+", "", word) or "word"


def check_dialect(adapter: Adapter, dialect: str) -> None:
    """Raise DiffgraftError where `dialect` cannot hold the adapter; nothing is written."""
    chosen, contents = _written(adapter, dialect)
    check_contents(adapter, *contents, chosen.name)


def dialect_of(adapter: Adapter, dialect: str) -> str:
    """Name of the dialect that `save_adapter` writes: `dialect` itself, or what ``auto`` stands for.

    Raises:
        DiffgraftError: it cannot hold the adapter.
    """
    return dialect if dialect != "auto" else _written(adapter, dialect)[0].name


def _written(adapter: Adapter, name: str) -> tuple[Dialect, Contents]:
    """The dialect that holds the adapter, with tensors and header."""
    last = ValueError("no format was tried")
    for dialect in _preferred(adapter) if name == "auto" else [get_written_dialect(name)]:
        assert dialect.write is not None
        try:
            if adapter.networks and not dialect.holds_networks:
                raise ValueError(f"it holds a {adapter.networks[0].kind}, for which these files have no place")
            return dialect, dialect.write(adapter)
        except ValueError as error:
            last = error
    raise _cannot(name, last) from last


def _preferred(adapter: Adapter) -> list[Dialect]:
    """What ``auto`` tries, in order."""
    tried = {dialect: dialect.auto for dialect in dialects().values() if dialect.write and dialect.auto is not None}

    def place(dialect: Dialect) -> tuple[bool, int]:
        is_preferred = dialect.is_preferred is not None and dialect.is_preferred(adapter)
        return not is_preferred, tried[dialect]

    return sorted(tried, key=place)


def _cannot(dialect: str, error: ValueError) -> DiffgraftError:
    return DiffgraftError(f"The adapter cannot be written in the format {dialect!r}: {error}.")
