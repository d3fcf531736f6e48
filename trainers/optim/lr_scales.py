"""What trains, at which share of the learning rate, and until when."""

from collections.abc import Collection

import torch

from diffgraft.adapters.method import Attached, is_of_text
from diffgraft.adapters.patterns import check_keys, chosen
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.hooks.ema import Average
from diffgraft.trainers.optim.optimizers import at_rest
from diffgraft.trainers.recipe.recipe import Recipe


def factors(recipe: Recipe, adapter: Attached) -> dict[str, float]:
    """Factor on the learning rate of each parameter, by its name: the method's own times that of the recipe."""
    own = adapter.rates()
    return {name: own.get(name, 1.0) * chosen(recipe.rates, path, 1.0) for name, path in adapter.paths().items()}


def freeze(recipe: Recipe, base: Base, adapter: Attached, kept: Collection[str] = ()) -> None:
    """Freeze what has a rate of 0, or does not reach the loss, before training begins.

    Such modules are left as the base has them, but for those at the paths `kept`, which hold something already.

    Raises:
        DiffgraftError: a key of the recipe's rates means nothing that is there, or nothing would train (any more).
    """
    paths = adapter.paths()
    check_keys("rates", recipe.rates, set(paths.values()))
    still = {path for path in paths.values() if not _trains(recipe, base, path)}
    adapter.leave(still - set(kept))
    for name, value in adapter.trainable().items():
        value.requires_grad_(paths[name] not in still)
    trained = set(paths.values()) - still
    if not trained:
        raise DiffgraftError(f"Nothing would train: the rates are 0 for all that {recipe.method} has here.")
    if recipe.text_encoder_stop is None:
        return
    said = f"text_encoder_stop={recipe.text_encoder_stop}"
    if not any(is_of_text(path) for path in trained):
        raise DiffgraftError(
            f"{said} means nothing here: no text encoder trains, and no word. Leave it out, or set text_encoder=true."
        )
    if all(is_of_text(path) for path in trained):
        raise DiffgraftError(f"With {said} nothing would train from there on: leave it out, and set steps instead.")


def _trains(recipe: Recipe, base: Base, path: str) -> bool:
    part, _, inside = path.partition(".")
    reaches = not is_of_text(path) or base.family.reaches(base, part, inside)
    return reaches and chosen(recipe.rates, path, 1.0) > 0


@torch.no_grad()
def stop_text(adapter: Attached, optimizer: torch.optim.Optimizer, average: Average | None) -> None:
    """End the training of text encoders and words: they keep the values that count, and never move again.

    Doing it twice is no harm.
    """
    paths = adapter.paths()
    of_text = [value for name, value in adapter.trainable().items() if is_of_text(paths[name])]
    with at_rest(optimizer, average):
        counting = [value.detach().clone() for value in of_text]
    for value, kept in zip(of_text, counting, strict=True):
        value.copy_(kept)
        value.requires_grad_(False)
        value.grad = None
        if (ahead := optimizer.state.get(value, {}).get("z")) is not None:  # where schedule-free has got to
            ahead.copy_(kept)
