"""Former names of functions in `diffgraft.bases.tokens`, kept for one release."""

from diffgraft.bases.tokens import token_ids
from diffgraft.bases.tokens import truncated_text as lost_words

__all__ = ["lost_words", "token_ids"]
