"""Adapter files: found by looking at their keys, read whole or refused, written under a temporary name first."""

from pathlib import Path
from types import ModuleType

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import cloneofsimo, diffusers_lora, embedding, lycoris, native, webui_hypernetwork
from diffgraft.adapters.formats.opened import open_file
from diffgraft.errors import DiffgraftError, nearest
from diffgraft.files import write_safetensors

DIALECTS: dict[str, ModuleType] = {
    "diffusers": diffusers_lora,
    "lycoris": lycoris,
    "embedding": embedding,
    "diffgraft": native,
    "webui-hypernetwork": webui_hypernetwork,
    "cloneofsimo": cloneofsimo,
}
"""Name of a dialect → the module that reads it, and writes it where it has a `write`; what more tools open, first."""

WRITTEN = [name for name, dialect in DIALECTS.items() if hasattr(dialect, "write")]


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter file in any dialect known.

    Raises:
        DiffgraftError: the file is missing, damaged, or holds a key that no dialect can place.
    """
    path = Path(path).expanduser()
    tensors, header = open_file(path)
    _refuse_broken_values(path, tensors)
    for dialect in DIALECTS.values():
        if dialect.recognises(tensors, header):
            try:
                adapter: Adapter = dialect.read(tensors, header)
                return adapter
            except ValueError as error:
                raise DiffgraftError(f"{path} cannot be read: {error}.") from error
    sample = ", ".join(list(tensors)[:3]) or "none"
    raise DiffgraftError(
        f"{path} holds no adapter that is known here: its keys are of no known dialect (first keys: {sample}). "
        f"Read are: {', '.join(DIALECTS)}."
    )


def save_adapter(adapter: Adapter, path: Path, dialect: str = "auto") -> Path:
    """Write `adapter` to `path` in `dialect`; `auto` is the first one that can hold it.

    Raises:
        DiffgraftError: there is no such dialect, or it cannot hold the adapter; nothing is written then.
    """
    if dialect not in (*WRITTEN, "auto"):
        raise DiffgraftError(f"There is no adapter format {dialect!r} to write: {nearest(dialect, WRITTEN)}")
    for name in WRITTEN if dialect == "auto" else (dialect,):
        try:
            if adapter.networks and name != "diffgraft":
                raise ValueError(f"it holds a {adapter.networks[0].kind}, for which these files have no place")
            tensors, header = DIALECTS[name].write(adapter)
        except ValueError as error:
            reason = str(error)
            continue
        return write_safetensors(path, tensors, header)
    raise DiffgraftError(f"The adapter cannot be written in the format {dialect!r}: {reason}.")


def _refuse_broken_values(path: Path, tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise DiffgraftError(
                f"{path} holds values that are no numbers (NaN or infinite) in {key}; a picture made with it would be "
                "black. The training run it came from diverged: use an earlier checkpoint or a lower learning rate."
            )
