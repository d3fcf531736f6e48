"""A base without its weights: what it is made of, for counting and estimating, in a second and in no memory."""

import copy
from dataclasses import fields
from pathlib import Path

import torch

from diffgraft.bases.base import Base
from diffgraft.bases.folder import pipeline_of
from diffgraft.bases.loading import configuration, known_pipelines, located, parts_of, read_single_file
from diffgraft.bases.prediction import scheduled
from diffgraft.bases.registry import families
from diffgraft.bases.unet import inpainting
from diffgraft.errors import DiffgraftError
from diffgraft.third_party import quiet_libraries


def meta_base(
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
    with quiet_libraries():
        if path.is_file():
            file = read_single_file(path)
            with configuration(file) as folder:
                pipe = pipeline_of(folder, known_pipelines(), "nowhere", tokenizers=file.tokenizers())
            pipe.scheduler = scheduled(pipe.scheduler, **file.told)
        else:
            is_local = str(source) == "tiny" or Path(source).expanduser().exists()
            pipe = pipeline_of(path, known_pipelines(), "headers" if is_local else "nowhere")
    pipe.scheduler = scheduled(pipe.scheduler, prediction_type, zero_snr)
    found = next(one for one in families().values() if one.matches(pipe))
    if type(pipe).__name__ not in (found.pipeline_class, inpainting(found.pipeline_class)):
        raise DiffgraftError(f"{source} is a {type(pipe).__name__}, and no base of the family {found.name} is.")
    return Base(name=str(source), family=found, **parts_of(pipe)).to(dtype=dtype)


def without_values(base: Base) -> Base:
    """A copy of a loaded base whose weights have no values (on the device ``meta``); tokenizers are shared."""
    copies = {name: copy.deepcopy(part).to("meta") for name, part in base.parts()}
    known = {one.name for one in fields(Base) if one.init}
    shared = {"name": base.name, "family": base.family, "scheduler": base.scheduler, **base.tokenizers()}
    found = {**shared, **copies}
    return Base(
        **{name: value for name, value in found.items() if name in known},
        others={name: value for name, value in found.items() if name not in known},
    )
