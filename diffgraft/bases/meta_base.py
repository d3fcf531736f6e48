"""Bases on the device ``meta``, whose weights have shapes but no values, for counting and estimates."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from diffgraft.bases.base import Base
from diffgraft.bases.folder import WeightsFrom, build_pipeline
from diffgraft.bases.loading import (
    components_of,
    config_folder,
    known_pipelines,
    locate_base,
    parts_of,
    read_single_file,
    refuse_components,
)
from diffgraft.bases.prediction import with_prediction_type
from diffgraft.bases.registry import families
from diffgraft.bases.transformer_files import open_transformer
from diffgraft.bases.unet import inpainting_class
from diffgraft.errors import DiffgraftError
from diffgraft.third_party import quiet_libraries


def meta_base(
    source: str | Path = "tiny",
    dtype: torch.dtype = torch.float32,
    *,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
    components: str | Path | None = None,
) -> Base:
    """Load a base on the device ``meta``: its weights have shapes and dtypes but no values; its tokenizers are real.

    Args:
        source: as in `load_base`; of a single file only the header is read, and of a model on the hub only its
            configuration is downloaded.
        dtype: dtype of the weights.
        prediction_type: as in `load_base`.
        zero_snr: as in `load_base`.
        components: as in `load_base`.

    Raises:
        DiffgraftError: as in `load_base`.
    """
    path = locate_base(source, weights=False)
    with quiet_libraries():
        pipe = _layout(path, source, components)
    pipe.scheduler = with_prediction_type(pipe.scheduler, prediction_type, zero_snr)
    family = next(family for family in families().values() if family.matches(pipe))
    if type(pipe).__name__ not in (family.pipeline_class, inpainting_class(family.pipeline_class)):
        raise DiffgraftError(
            f"{source} is a {type(pipe).__name__}, which draws otherwise than a base of the family {family.name}. "
            "Give a text-to-image model."
        )
    base = Base(name=str(source), family=family, **parts_of(pipe), components_from=str(components or ""))
    return base.to("meta", dtype)  # tables of positions, which are in no file, have values until here


def _layout(path: Path, source: str | Path, components: str | Path | None) -> Any:
    """Return the pipeline of a folder or file, with networks on the device ``meta``."""
    if not path.is_file():
        refuse_components(path, components)
        return build_pipeline(path, known_pipelines(), _compared(source))
    with open_transformer(path) as transformer:
        if transformer is not None:
            folder = components_of(transformer, components, weights=False)
            return transformer.load(folder, _compared(components or "")).pipe
    refuse_components(path, components)
    file = read_single_file(path)
    with config_folder(file) as folder:
        pipe = build_pipeline(folder, known_pipelines(), "nowhere", loaded=file.tokenizers())
    pipe.scheduler = with_prediction_type(pipe.scheduler, **file.prediction)
    return pipe


def _compared(source: str | Path) -> WeightsFrom:
    """Return what the weights of a base are compared with: headers of files on this machine; others are not there."""
    is_local = str(source) == "tiny" or Path(source).expanduser().exists()
    return "headers" if is_local else "nowhere"


def without_values(base: Base) -> Base:
    """Return a copy of a loaded base on the device ``meta``, with shapes but no values; tokenizers are shared."""
    copies = {name: copy.deepcopy(part).to("meta") for name, part in base.parts()}
    known = {field.name for field in fields(Base) if field.init}
    shared = {
        "name": base.name,
        "family": base.family,
        "components_from": base.components_from,
        "scheduler": base.scheduler,
        **base.tokenizers(),
    }
    parts = {**shared, **copies}
    return Base(
        **{name: value for name, value in parts.items() if name in known},
        others={name: value for name, value in parts.items() if name not in known},
    )
