"""Base class of all groups of settings, and their validation with a sentence for the first error."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from diffgraft.errors import DiffgraftError, short_repr

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """A pydantic model that refuses unknown keys, and whose field docstrings are the descriptions of its fields."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)


def validated(kind: type[Model], values: Mapping[str, Any], prefix: str) -> Model:
    """Return the model `kind` of these values, which are converted to the types of its fields.

    Raises:
        DiffgraftError: a value is invalid; the message names it as ``prefix.NAME``.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (prefix, *first["loc"])))
        raise DiffgraftError(f"Invalid value {key}={short_repr(first['input'])}: {first['msg'].lower()}.") from error
