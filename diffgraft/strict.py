"""The model that all groups of settings are made of."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Unknown keys and values of the wrong kind are errors; docstrings of fields say what they mean."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)
