"""Saving of adapter files: what a dialect writes is read again in memory before the file is stored on disk."""

import re
from pathlib import Path

from diffgraft.adapters.adapter import Adapter, register_adapter_writer
from diffgraft.adapters.dialect import Contents, Dialect
from diffgraft.adapters.formats.verify import check_contents
from diffgraft.adapters.registry import dialects, get_written_dialect
from diffgraft.errors import DiffgraftError


@register_adapter_writer
def save_adapter(adapter: Adapter, path: Path, dialect: str = "auto") -> Path:
    """Write `adapter` to `path` in `dialect`; `auto` selects the most widely read dialect that can hold it.

    Raises:
        DiffgraftError: there is no such dialect, or it cannot hold the adapter, or its writer drops something; no file
            is written then.
    """
    if not (adapter.deltas or adapter.tokens or adapter.networks):
        raise DiffgraftError(f"There is nothing to write into {path}: the adapter changes no layer and holds no word.")
    selected, (tensors, header) = _write(adapter, dialect)
    check_contents(adapter, tensors, header, selected.name)
    try:
        return selected.store(path, tensors, header)
    except ValueError as error:
        raise _cannot_write(dialect, error) from error


def save_words(adapter: Adapter, folder: Path) -> list[Path]:
    """Write each learned word of an adapter into its own file in `folder`, beside the weights trained with it.

    ComfyUI, Forge and InvokeAI load only the weights from adapter files that also hold words.

    Returns:
        Paths ``adapter.<word>.safetensors``; characters that file names cannot contain are removed from the word.
    """
    return [
        save_adapter(only_word(adapter, word), folder / f"adapter.{_safe_name(word)}.safetensors", "webui")
        for word in adapter.tokens
    ]


def only_word(adapter: Adapter, word: str) -> Adapter:
    """Return an adapter with the trained embedding of `word` alone, without the changes of weights."""
    metadata = {**adapter.metadata, "method": "textual-inversion", "trigger": word}
    return Adapter({}, metadata, tokens={word: adapter.tokens[word]})


def _safe_name(word: str) -> str:
    return re.sub(r"[^\w.-]+", "", word) or "word"


def check_dialect(adapter: Adapter, dialect: str) -> None:
    """Raise DiffgraftError if `dialect` cannot hold the adapter; nothing is written."""
    selected, contents = _write(adapter, dialect)
    check_contents(adapter, *contents, selected.name)


def dialect_of(adapter: Adapter, dialect: str) -> str:
    """Name of the dialect that `save_adapter` writes: `dialect` itself, or the one that ``auto`` selects.

    Raises:
        DiffgraftError: no dialect can hold the adapter.
    """
    return dialect if dialect != "auto" else _write(adapter, dialect)[0].name


def _write(adapter: Adapter, name: str) -> tuple[Dialect, Contents]:
    """The dialect called `name` (or selected by ``auto``), with the tensors and the header that it writes."""
    last = ValueError("no format was tried")
    for dialect in _in_auto_order(adapter) if name == "auto" else [get_written_dialect(name)]:
        assert dialect.write is not None
        try:
            if adapter.networks and not dialect.holds_networks:
                raise ValueError(f"it holds a {adapter.networks[0].kind}, which such files cannot hold")
            return dialect, dialect.write(adapter)
        except ValueError as error:
            last = error
    raise _cannot_write(name, last) from last


def _in_auto_order(adapter: Adapter) -> list[Dialect]:
    """Dialects in the order in which ``auto`` tries them for `adapter`."""
    tried = {dialect: dialect.auto for dialect in dialects().values() if dialect.write and dialect.auto is not None}

    def place(dialect: Dialect) -> tuple[bool, int]:
        is_preferred = dialect.is_preferred is not None and dialect.is_preferred(adapter)
        return not is_preferred, tried[dialect]

    return sorted(tried, key=place)


def _cannot_write(dialect: str, error: ValueError) -> DiffgraftError:
    return DiffgraftError(f"The adapter cannot be written in the format {dialect!r}: {error}.")
