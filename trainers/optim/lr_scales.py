"""Which parameters train, at which learning-rate scale, and until which step."""

from collections.abc import Collection, Mapping

import torch

from diffgraft.adapters.method import Attached
from diffgraft.adapters.patterns import check_pattern_keys, last_matching_value
from diffgraft.bases import Base
from diffgraft.bases.layers import is_of_text
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.hooks.ema import Ema
from diffgraft.trainers.optim.optimizers import check_optimizer, eval_weights
from diffgraft.trainers.recipe.groups import OptimSettings


def lr_scales(scales: Mapping[str, float], adapter: Attached) -> dict[str, float]:
    """Learning-rate scale of each parameter, by its name: the method's scale times the one in the recipe's `scales`."""
    method_scales = adapter.lr_scales()
    return {
        name: method_scales.get(name, 1.0) * last_matching_value(scales, path, 1.0)
        for name, path in adapter.paths().items()
    }


def freeze(optim: OptimSettings, base: Base, adapter: Attached, keep: Collection[str] = ()) -> None:
    """Freeze modules whose learning-rate scale is 0 or whose output does not affect the loss, before training starts.

    Frozen modules are detached from the base, except those at the paths `keep`, which already hold trained values.

    Raises:
        DiffgraftError: a key of the recipe's `lr_scale` matches no module, or no module would train.
    """
    paths = adapter.paths()
    check_pattern_keys("lr_scale", optim.lr_scale, set(paths.values()))
    frozen = {path for path in paths.values() if not _trains(optim.lr_scale, base, path)}
    adapter.detach_modules(frozen - set(keep))
    for name, value in adapter.trainable().items():
        value.requires_grad_(paths[name] not in frozen)
    trained = set(paths.values()) - frozen
    if not trained:
        raise DiffgraftError(
            "No module would train: `lr_scale` is 0 for every module of the adapter. Leave one above 0."
        )
    if optim.text_encoder_stop is None:
        return
    setting = f"text_encoder_stop={optim.text_encoder_stop}"
    if not any(is_of_text(path) for path in trained):
        raise DiffgraftError(
            f"{setting} has no effect, as no text encoder and no token trains: remove it, or set text_encoder=true."
        )
    if all(is_of_text(path) for path in trained):
        raise DiffgraftError(f"With {setting} nothing would train after that step: remove it, and set steps instead.")


def _trains(scales: Mapping[str, float], base: Base, path: str) -> bool:
    """Whether the module at `path` affects the loss and has a learning-rate scale above 0."""
    part, _, inside = path.partition(".")
    return base.family.affects_output(base, part, inside) and last_matching_value(scales, path, 1.0) > 0


@torch.no_grad()
def freeze_text_parameters(adapter: Attached, optimizer: torch.optim.Optimizer, ema: Ema | None) -> None:
    """Freeze text encoders and token embeddings at the values used for saving (those of the EMA, if there is one).

    Calling it again has no effect.
    """
    paths = adapter.paths()
    parameters = [value for name, value in adapter.trainable().items() if is_of_text(paths[name])]
    with eval_weights(optimizer, ema):
        final_values = [value.detach().clone() for value in parameters]
    for value, final in zip(parameters, final_values, strict=True):
        value.copy_(final)
        value.requires_grad_(False)
        value.grad = None
        if (z := optimizer.state.get(value, {}).get("z")) is not None:  # the base sequence of schedule-free
            z.copy_(final)


def check_attached(optim: OptimSettings, live: Attached) -> None:
    """Check that the optimizer supports the learning-rate scales of the attached method.

    Raises:
        DiffgraftError: it does not support different scales.
    """
    trained = {name for name, value in live.trainable().items() if value.requires_grad}
    scales = lr_scales(optim.lr_scale, live)
    check_optimizer(optim, [scales.get(name, 1.0) for name in trained])
