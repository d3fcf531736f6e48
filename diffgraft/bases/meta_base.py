"""Bases on the device ``meta``, whose weights have shapes but no values, for counting and estimates."""

import copy
from dataclasses import fields
from pathlib import Path

import torch

from diffgraft.bases.base import Base
from diffgraft.bases.folder import build_pipeline
from diffgraft.bases.loading import config_folder, known_pipelines, locate_base, parts_of, read_single_file
from diffgraft.bases.prediction import with_prediction_type
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
    """Load a base on the device ``meta``: its weights have shapes and dtypes but no values; its tokenizers are real.

    Args:
        source: as in `load_base`; of a single file only the header is read, and of a model on the hub only its
            configuration is downloaded.
        dtype: dtype of the weights.
        prediction_type: as in `load_base`.
        zero_snr: as in `load_base`.

    Raises:
        DiffgraftError: as in `load_base`.
    """
    path = locate_base(source, weights=False)
    with quiet_libraries():
        if path.is_file():
            file = read_single_file(path)
            with config_folder(file) as folder:
                pipe = build_pipeline(folder, known_pipelines(), "nowhere", tokenizers=file.tokenizers())
            pipe.scheduler = with_prediction_type(pipe.scheduler, **file.prediction)
        else:
            is_local = str(source) == "tiny" or Path(source).expanduser().exists()
            pipe = build_pipeline(path, known_pipelines(), "headers" if is_local else "nowhere")
    pipe.scheduler = with_prediction_type(pipe.scheduler, prediction_type, zero_snr)
    family = next(family for family in families().values() if family.matches(pipe))
    if type(pipe).__name__ not in (family.pipeline_class, inpainting(family.pipeline_class)):
        raise DiffgraftError(
            f"{source} is a {type(pipe).__name__}, which draws otherwise than a base of the family {family.name}. "
            "Give a text-to-image model."
        )
    base = Base(name=str(source), family=family, **parts_of(pipe))
    return base.to("meta", dtype)  # tables of positions, which are in no file, have values until here


def without_values(base: Base) -> Base:
    """Return a copy of a loaded base on the device ``meta``, with shapes but no values; tokenizers are shared."""
    copies = {name: copy.deepcopy(part).to("meta") for name, part in base.parts()}
    known = {field.name for field in fields(Base) if field.init}
    shared = {"name": base.name, "family": base.family, "scheduler": base.scheduler, **base.tokenizers()}
    parts = {**shared, **copies}
    return Base(
        **{name: value for name, value in parts.items() if name in known},
        others={name: value for name, value in parts.items() if name not in known},
    )
