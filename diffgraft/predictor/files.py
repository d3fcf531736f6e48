"""Files of predictors: one safetensors file, with the arguments of the network and its base in the header."""

import json
from pathlib import Path
from typing import Any

import torch

from diffgraft.adapters.formats.reader import open_file
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError, one_line
from diffgraft.files import write_safetensors
from diffgraft.predictor.network import WeightPredictor
from diffgraft.strict import Strict, validated

SHIPPED = Path(__file__).with_name("tiny.safetensors")
"""The predictor of the embedded base"""
_KEY = "diffgraft_predictor"


class PredictorSettings(Strict):
    """The header's entry: arguments of `WeightPredictor`, and the base that it is for."""

    layers: dict[str, list[int]]
    rank: int
    width: int
    tokens: int
    base_hash: str


def write_predictor(path: Path, model: WeightPredictor, base: Base) -> Path:
    """Write a predictor in float16."""
    tensors = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    header = {"format": "pt", _KEY: json.dumps({**model.settings, "base_hash": base.hash})}
    return write_safetensors(path, tensors, header)


def read_predictor(path: Path, base: Base) -> WeightPredictor:
    """Read a predictor, in float32 on the CPU.

    Raises:
        DiffgraftError: the file is missing, is not a predictor, or is for another base.
    """
    tensors, header = open_file(path)
    try:
        found: Any = json.loads(header.get(_KEY, ""))
        settings = validated(PredictorSettings, found, "header")
    except (ValueError, TypeError, DiffgraftError) as error:
        raise DiffgraftError(
            f"{path} is not a predictor of weights: its header has no valid {_KEY}. "
            f"Give a file made by python -m diffgraft.predictor.train."
        ) from error
    if settings.base_hash != base.hash:
        raise DiffgraftError(f"{path} predicts weights for another base than {base.name}: use that base.")
    try:
        with torch.device("meta"):
            model = WeightPredictor(settings.layers, settings.rank, settings.width, settings.tokens)
        model.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise DiffgraftError(f"{path} is damaged: {one_line(error, 200)}. Copy it again.") from error
    return model.requires_grad_(False).eval()
