"""Parameter-efficient fine-tuning of text-to-image diffusion models.

A base (denoiser, text encoders, VAE) stays frozen. A small adapter is trained on a few pictures, saved as one
safetensors file, and applied to a diffusers pipeline when pictures are generated::

    import diffgraft as dg

    run = dg.train("subject", images="my_dog/", subject="dog")
    pictures = dg.generate("a sks dog in the snow", run, count=4)

    base = dg.load_base("tiny")  # or a hub id, a diffusers folder, a single .safetensors checkpoint
    pipe = base.pipeline()
    with dg.graft(pipe, {"dog.safetensors": 0.8, "ink.safetensors": 0.5}):
        pipe("a sks dog in the snow")  # afterwards the weights are the same bits as before

The commands of ``diffgraft`` are functions: `train`, `plan`, `generate`, `evaluate`, `convert`, `combine`, `merge`,
`inspect`, `resize`, `extract`, `grid`, `sheet`, `regenerate`, `replay`, `card` and `push`. Errors that a user can fix
are `DiffgraftError`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffgraft.adapters.adapter import Adapter
    from diffgraft.adapters.formats import load_adapter
    from diffgraft.api import combine, convert, extract, grid, inspect, merge, plan, resize
    from diffgraft.bases import Base, load_base
    from diffgraft.draw import generate, sheet
    from diffgraft.errors import DiffgraftError
    from diffgraft.evaluation.evaluate import evaluate
    from diffgraft.generation.graft import graft
    from diffgraft.generation.regenerate import regenerate
    from diffgraft.generation.session import Session
    from diffgraft.generation.settings import DrawSettings
    from diffgraft.hub_upload import push
    from diffgraft.model_card import card
    from diffgraft.predictor.predict import predict_adapter
    from diffgraft.trainers.run.folder import Run
    from diffgraft.trainers.run.replay import replay
    from diffgraft.trainers.run.train import train

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "diffgraft.adapters.adapter",
    "load_adapter": "diffgraft.adapters.formats",
    "Base": "diffgraft.bases",
    "load_base": "diffgraft.bases",
    "DiffgraftError": "diffgraft.errors",
    "evaluate": "diffgraft.evaluation.evaluate",
    "graft": "diffgraft.generation.graft",
    "generate": "diffgraft.draw",
    "sheet": "diffgraft.draw",
    "regenerate": "diffgraft.generation.regenerate",
    "DrawSettings": "diffgraft.generation.settings",
    "Session": "diffgraft.generation.session",
    **dict.fromkeys(("combine", "convert", "extract", "grid", "inspect", "merge", "plan", "resize"), "diffgraft.api"),
    "Run": "diffgraft.trainers.run.folder",
    "train": "diffgraft.trainers.run.train",
    "replay": "diffgraft.trainers.run.replay",
    "card": "diffgraft.model_card",
    "push": "diffgraft.hub_upload",
    "predict_adapter": "diffgraft.predictor.predict",
}
__all__ = [
    "Adapter",
    "Base",
    "DiffgraftError",
    "DrawSettings",
    "Run",
    "Session",
    "card",
    "combine",
    "convert",
    "evaluate",
    "extract",
    "generate",
    "graft",
    "grid",
    "inspect",
    "load_adapter",
    "load_base",
    "merge",
    "plan",
    "predict_adapter",
    "push",
    "regenerate",
    "replay",
    "resize",
    "sheet",
    "train",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``diffgraft --help`` does not wait seconds for torch and diffusers."""
    if name not in _HOMES:
        raise AttributeError(f"module 'diffgraft' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
