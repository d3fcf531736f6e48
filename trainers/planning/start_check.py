"""Check of a plan that the file of `init_from` began with the same part of the base's weights as the run would."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases import Base
from diffgraft.bases.loading import locate_base
from diffgraft.bases.quantized import weight_and_bias
from diffgraft.bases.weights import open_weights
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.adapter_file import AdapterFile
from diffgraft.trainers.run.attach import attach


def check_start(recipe: Recipe, base: Base, start: AdapterFile | None, loaded_base: Base | None) -> None:
    """Check a start from the weight (`options.init`) at the smallest layer of the file, whose weight alone is read.

    Nothing is checked where the weight cannot be read, as of a base that is not downloaded yet, or is quantized.

    Args:
        recipe: the recipe.
        base: its base on the device ``meta``, which is the same afterwards.
        start: the file of `init_from`; None without one.
        loaded_base: the base with its weights, if it is loaded.

    Raises:
        DiffgraftError: the file began otherwise, as `train` would find.
    """
    options = {**recipe.options, **(recipe.options.get("weights_options") or {})}
    if start is None or options.get("init", "zero") == "zero" or recipe.quantize != "none":
        return
    if (path := _smallest(start.adapter, base)) is None:
        return
    value = _weight(recipe, base, path, loaded_base)
    if value is not None and value.numel() == base.denoiser.get_submodule(path).get_parameter("weight").numel():
        with _given(base.denoiser.get_submodule(path), value):
            attach(recipe, base, start).detach()


def _smallest(adapter: Adapter, base: Base) -> str | None:
    """Return the path, inside the denoiser, of the layer with the least weights that the adapter changes."""
    part = base.family.denoiser
    layers = {name.removeprefix(f"{part}."): name for name in adapter.deltas if name.startswith(f"{part}.")}
    known = {name: value.numel() for name, value in base.denoiser.named_parameters()}
    sizes = {path: known[f"{path}.weight"] for path in layers if f"{path}.weight" in known}
    return min(sizes, key=lambda path: sizes[path], default=None)


def _weight(recipe: Recipe, base: Base, path: str, loaded_base: Base | None) -> Tensor | None:
    """Return the weight of a layer of the denoiser; None if it cannot be read."""
    if loaded_base is not None:
        weight, _ = weight_and_bias(loaded_base.denoiser.get_submodule(path))
        return None if weight.is_meta else weight.detach().cpu()
    try:
        source = recipe.base if recipe.base == "tiny" else locate_base(recipe.base, weights=False)
        with open_weights(source) as weights:
            return weights.get(f"{base.family.denoiser}.{path}.weight")
    except DiffgraftError:
        return None


@contextmanager
def _given(layer: nn.Module, value: Tensor) -> Iterator[None]:
    """Give a layer on ``meta`` a weight within the block."""
    before = layer.get_parameter("weight")
    layer.weight = nn.Parameter(value.to(before.dtype).view(before.shape), requires_grad=False)
    try:
        yield
    finally:
        layer.weight = before
