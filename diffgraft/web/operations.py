"""New files made of adapters of the library: converted, resized, combined, or merged into a base."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffgraft.adapters.listing import format_summaries
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.web.commands import Commands
from diffgraft.web.library import find_adapter
from diffgraft.web.paths import check_value, safe_name
from diffgraft.web.settings import Settings

FORMATS = ("auto", *(name for name in format_summaries() if name != "peft"))
"""Formats of files; peft's is a folder"""
Kind = Literal["convert", "resize", "combine", "merge"]
KINDS: tuple[Kind, ...] = ("convert", "resize", "combine", "merge")


class ChosenAdapter(BaseModel):
    """An adapter that a new file is made of."""

    model_config = ConfigDict(extra="forbid")

    file: Annotated[str, Field(max_length=1000, pattern=r"^[^:|]+$")]
    """Path relative to the library folder"""
    strength: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = 1.0
    """With combine and merge"""


class OperationRequest(BaseModel):
    """Request: convert, combine, resize or merge adapters into a new file."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    adapters: Annotated[list[ChosenAdapter], Field(min_length=1, max_length=20)]
    """One to convert or resize, several to combine or merge"""
    name: Annotated[str, Field(max_length=200)] = ""
    """Name of the new file; empty: after the first adapter"""
    to: Annotated[str, Field(max_length=40)] = "auto"
    """Format of the new file; a merged checkpoint has none"""
    rank: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Rank of each module; None: as it is"""
    base: Annotated[str, Field(max_length=1000)] = ""
    """Base that is merged into, or whose weights are needed"""


@dataclass(frozen=True)
class OperationReport:
    """Outcome of an operation: the new file and the report of the command."""

    file: str
    """Path of the new file, relative to the library folder; empty if there is none"""
    lines: tuple[str, ...]
    """Report of the command"""
    refusal: str
    """Why there is no new file; empty if there is one"""


class Operations:
    """Converts, combines, resizes and merges adapters of a studio."""

    def __init__(self, settings: Settings, commands: Commands) -> None:
        self._settings, self._commands = settings, commands

    def make(self, request: OperationRequest) -> OperationReport:
        """Make a file in the library folder.

        Raises:
            DiffgraftError: an adapter or the base is not in the studio's folders, or their number does not fit.
            TooManyJobsError: another command is being run.
        """
        root = self._settings.root
        files = [find_adapter(root, adapter.file) for adapter in request.adapters]
        if request.base:
            check_value((root, *self._settings.folders), request.base)
        if request.base.startswith("-"):
            raise DiffgraftError(f"Invalid base {request.base[:100]!r}: must be a name, an id or a path.")
        if request.kind in ("convert", "resize") and len(files) != 1:
            raise DiffgraftError(f"{request.kind} takes one adapter, and {len(files)} are given: choose one.")
        if request.kind == "merge" and not request.base:
            raise DiffgraftError("The base to merge into is missing: give its path.")
        if request.to not in FORMATS:
            raise DiffgraftError(f"Invalid value to={request.to!r}: {did_you_mean(request.to, FORMATS)}")
        output = self._free(request, files[0])
        said = self._commands.run(self._words(request, files, output))
        return OperationReport("" if said.refusal else output.name, said.lines, said.refusal)

    def _words(self, request: OperationRequest, files: list[Path], output: Path) -> list[str]:
        weighted = [f"{file}:{own.strength:g}" for file, own in zip(files, request.adapters, strict=True)]
        options = ["--to", request.to]
        options += ["--rank", str(request.rank)] if request.rank is not None else []
        base = ["--base", request.base] if request.base else []
        if request.kind == "convert":
            return ["convert", str(files[0]), str(output), *options, *base]
        if request.kind == "resize":
            return ["resize", str(files[0]), "--output", str(output), *options, *base]
        if request.kind == "combine":
            return ["combine", *weighted, "--output", str(output), *options, *base]
        return ["merge", *weighted, "--into", request.base, "--output", str(output)]

    def _free(self, request: OperationRequest, first: Path) -> Path:
        """Return the path of a file that does not exist."""
        stem = first.parent.name if first.stem == "adapter" else first.stem
        usual = safe_name(f"{stem}-{request.kind}", request.kind)
        name = safe_name(request.name.removesuffix(".safetensors"), usual) if request.name else usual
        number, path = 1, self._settings.root / f"{name}.safetensors"
        while path.exists():
            number += 1
            path = path.with_name(f"{name}-{number}.safetensors")
        return path
