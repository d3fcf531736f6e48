"""Pipelines of diffusers that are modular: loaded parts are given to them after they are created."""

from collections.abc import Mapping
from typing import Any

from diffgraft.third_party import quiet_libraries

MODULAR_INDEX = "modular_model_index.json"
"""Index of the folder of a modular pipeline"""
INDEXES = ("model_index.json", MODULAR_INDEX)
"""Names that the index of a diffusers folder may have"""


def pipeline_of(kind: str, parts: Mapping[str, Any]) -> Any:
    """Create the pipeline of diffusers with the class name `kind`, plain or modular, from its parts by name.

    The steps of a modular pipeline are those that diffusers has for its class, and never code of a model.
    """
    import diffusers

    model: Any = getattr(diffusers, kind)
    if not is_modular(model):
        return model(**parts)
    with quiet_libraries():  # diffusers tells that such pipelines are new
        pipe = model()
        pipe.update_components(**parts)
    return pipe


def is_modular(kind: Any) -> bool:
    """Whether a pipeline, or the class of one, is modular."""
    return str(getattr(kind, "config_name", "")) == MODULAR_INDEX
