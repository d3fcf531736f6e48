"""A base without its weights: what it is made of, for counting and estimating, in a second and in no memory."""

from pathlib import Path
from typing import Any

import torch

from diffgraft.bases.base import PARTS, Base, inpainting
from diffgraft.bases.loading import CONFIGS, FAMILIES, configuration, index_of, located, read_single_file
from diffgraft.bases.prediction import scheduled
from diffgraft.errors import DiffgraftError
from diffgraft.quiet import hushed


def outline(
    source: str | Path = "tiny",
    dtype: torch.dtype = torch.float32,
    *,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
) -> Base:
    """A base whose weights have shapes and precisions but no values (on the device ``meta``); its tokenizers are real.

    Args:
        source: what `load_base` takes; of a single file only the header is read, and of a model on the hub only its
            configuration is brought.
        dtype: precision.
        prediction_type: as in `load_base`.
        zero_snr: as in `load_base`.

    Raises:
        DiffgraftError: as in `load_base`.
    """
    path = located(source, weights=False)
    with hushed():
        if path.is_file():
            file = read_single_file(path)
            with configuration(CONFIGS / file.family, file.channels) as folder:
                pipe = _built(folder, file.tokenizers())
            pipe.scheduler = scheduled(pipe.scheduler, **file.told)
        else:
            pipe = _built(path, {})
    pipe.scheduler = scheduled(pipe.scheduler, prediction_type, zero_snr)
    found = next(one for one in FAMILIES.values() if one.holds(pipe))
    if type(pipe).__name__ not in (found.pipeline_class, inpainting(found.pipeline_class)):
        raise DiffgraftError(f"{source} is a {type(pipe).__name__}, and no base of the family {found.name} is.")
    names = ("unet", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return Base(name=str(source), family=found, **{name: getattr(pipe, name, None) for name in names}).to(dtype=dtype)


def _built(folder: Path, given: dict[str, Any]) -> Any:
    """The pipeline that a diffusers folder's index describes, made of its configurations."""
    import diffusers
    import transformers

    index = index_of(folder)
    libraries = {"diffusers": diffusers, "transformers": transformers}
    parts: dict[str, Any] = {**given}
    for name, said in index.items():
        if name in given or not isinstance(said, list):
            continue
        kind: Any = getattr(libraries.get(said[0]), said[1] or "", None)
        if name in (*PARTS, "vae") and kind is not None:
            with torch.device("meta"):
                if said[0] == "diffusers":
                    parts[name] = kind.from_config(kind.load_config(folder / name))
                else:
                    parts[name] = kind(kind.config_class.from_pretrained(folder / name))
        elif name == "scheduler" or (name.startswith("tokenizer") and kind is not None):
            parts[name] = kind.from_pretrained(folder / name)
        else:
            parts[name] = None
    if "safety_checker" in index:
        parts["requires_safety_checker"] = False
    return getattr(diffusers, index["_class_name"])(**parts)
