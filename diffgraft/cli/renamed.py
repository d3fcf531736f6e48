"""Command-line options that have been renamed: the former ones work for one release, with a warning."""

import warnings
from typing import Any

from typer.core import TyperCommand

RENAMED = {
    "train": {"--changed": "--allow-changes"},
    "caption": {"--most": "--max-tokens", "--ask": "--question"},
    "combine": {"--way": "--algorithm"},
}
"""Command → former option → current option"""


class Command(TyperCommand):
    """A command that also takes its options under their former names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse a command line, `args`, in which former option names have been replaced by the current ones."""
        return super().parse_args(ctx, [self._current(word) for word in args])

    def _current(self, word: str) -> str:
        option, sign, value = word.partition("=")
        current = RENAMED.get(self.name or "", {}).get(option)
        if current is None:
            return word
        warnings.warn(f"The option {option} is now called {current}; use the new name.", stacklevel=2)
        return f"{current}{sign}{value}"
