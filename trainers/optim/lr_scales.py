"""What trains, at which share of the learning rate, and until when."""

from collections.abc import Collection, Mapping

import torch

from diffgraft.adapters.method import Attached
from diffgraft.adapters.patterns import check_keys, last_match
from diffgraft.bases import Base
from diffgraft.bases.layers import is_of_text
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.hooks.ema import Ema
from diffgraft.trainers.optim.optimizers import check_optimizer, eval_weights
from diffgraft.trainers.recipe.groups import OptimSettings


def lr_scales(rates: Mapping[str, float], adapter: Attached) -> dict[str, float]:
    """Learning-rate scale of each parameter, by its name: the method's own times that of the recipe's `rates`."""
    own = adapter.lr_scales()
    return {name: own.get(name, 1.0) * last_match(rates, path, 1.0) for name, path in adapter.paths().items()}


def freeze(optim: OptimSettings, base: Base, adapter: Attached, kept: Collection[str] = ()) -> None:
    """Freeze what has a rate of 0, or does not reach the loss, before training begins.

    Such modules are left as the base has them, but for those at the paths `kept`, which hold something already.

    Raises:
        DiffgraftError: a key of the recipe's rates means nothing that is there, or nothing would train (any more).
    """
    paths = adapter.paths()
    check_keys("lr_scale", optim.lr_scale, set(paths.values()))
    still = {path for path in paths.values() if not _trains(optim.lr_scale, base, path)}
    adapter.detach_modules(still - set(kept))
    for name, value in adapter.trainable().items():
        value.requires_grad_(paths[name] not in still)
    trained = set(paths.values()) - still
    if not trained:
        raise DiffgraftError("Nothing would train: the rates are 0 for every module of the adapter.")
    if optim.text_encoder_stop is None:
        return
    said = f"text_encoder_stop={optim.text_encoder_stop}"
    if not any(is_of_text(path) for path in trained):
        raise DiffgraftError(
            f"{said} means nothing here: no text encoder trains, and no word. Leave it out, or set text_encoder=true."
        )
    if all(is_of_text(path) for path in trained):
        raise DiffgraftError(f"With {said} nothing would train from there on: leave it out, and set steps instead.")


def _trains(rates: Mapping[str, float], base: Base, path: str) -> bool:
    part, _, inside = path.partition(".")
    reaches = not is_of_text(path) or base.family.affects_output(base, part, inside)
    return reaches and last_match(rates, path, 1.0) > 0


@torch.no_grad()
def stop_text(adapter: Attached, optimizer: torch.optim.Optimizer, ema: Ema | None) -> None:
    """End the training of text encoders and words: they keep the values that count, and never move again.

    Doing it twice is no harm.
    """
    paths = adapter.paths()
    of_text = [value for name, value in adapter.trainable().items() if is_of_text(paths[name])]
    with eval_weights(optimizer, ema):
        counting = [value.detach().clone() for value in of_text]
    for value, kept in zip(of_text, counting, strict=True):
        value.copy_(kept)
        value.requires_grad_(False)
        value.grad = None
        if (ahead := optimizer.state.get(value, {}).get("z")) is not None:  # where schedule-free has got to
            ahead.copy_(kept)


def check_attached(optim: OptimSettings, live: Attached) -> None:
    """Refuse what the optimizer cannot do with what is attached.

    Raises:
        DiffgraftError: parameters have rates that it cannot keep apart.
    """
    trained = {name for name, value in live.trainable().items() if value.requires_grad}
    rates = lr_scales(optim.lr_scale, live)
    check_optimizer(optim, [rates.get(name, 1.0) for name in trained])
