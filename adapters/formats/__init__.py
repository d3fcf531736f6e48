"""File formats of adapters, one module per dialect; `loading` reads files and `saving` writes them."""

from diffgraft.adapters.formats.loading import load_adapter, load_for_base
from diffgraft.adapters.formats.saving import check_dialect, dialect_of, only_word, save_adapter, save_words

__all__ = ["check_dialect", "dialect_of", "load_adapter", "load_for_base", "only_word", "save_adapter", "save_words"]
