"""A checkpoint of its own: a base with adapters merged into its weights for good."""

import shutil
from pathlib import Path

from tqdm import tqdm

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import Strengths, graft
from diffgraft.quiet import hushed


def bake(base: Base, adapters: Strengths, folder: str | Path) -> Path:
    """Write `base` with `adapters` merged into it as a diffusers folder, its weights in their own precision.

    `base` is afterwards as it was, and nothing half-written has the folder's name.

    Raises:
        DiffgraftError: the folder is there already, or an adapter holds what no weight can: words or networks.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise DiffgraftError(f"{folder} is there already. Choose another folder, or remove it.")
    loaded = {
        source if isinstance(source, Adapter) else load_adapter(source): value for source, value in adapters.items()
    }
    for adapter in loaded:
        if adapter.tokens or adapter.networks:
            what = "words" if adapter.tokens else "networks"
            raise DiffgraftError(
                f"A {adapter.method} adapter holds {what}, which cannot be merged into weights. Leave it beside the "
                "base and give it when drawing."
            )
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with graft(base, loaded), hushed():
            pipe = base.pipeline()
            pipe.save_config(partial)
            parts = {name: part for name, part in pipe.components.items() if part is not None}
            for name, part in tqdm(parts.items(), "writing the checkpoint", leave=False):
                part.save_pretrained(partial / name)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
