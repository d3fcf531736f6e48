"""Check of a plan that the file of `init_from` began with the same part of the base's weights as the run would."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.method import Attached
from diffgraft.bases import Base
from diffgraft.bases.loading import locate_base
from diffgraft.bases.quantized import weight_and_bias
from diffgraft.bases.weights import open_weights
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.groups import AdapterSettings, ModelSettings
from diffgraft.trainers.run.adapter_file import AdapterFile


@dataclass(frozen=True)
class Bases:
    """A base without weights and, if it was loaded, with them."""

    empty: Base
    """The base on the device ``meta``"""
    loaded: Base | None
    """The base with its weights, if it is loaded"""


def check_start(
    adapter: AdapterSettings,
    model: ModelSettings,
    bases: Bases,
    start: AdapterFile | None,
    attach: Callable[[], Attached],
) -> None:
    """Check a start from the weight (`options.init`) at the smallest layer of the file, whose weight alone is read.

    Nothing is checked where the weight cannot be read, as of a base that is not downloaded yet, or is quantized.

    Args:
        adapter: the recipe's method and options.
        model: its base and quantization.
        bases: the base; `empty` is the same afterwards.
        start: the file of `init_from`; None without one.
        attach: function that attaches the method to `bases.empty`, with the values of `start`.

    Raises:
        DiffgraftError: the file began otherwise, as `train` would find.
    """
    options = {**adapter.options, **(adapter.options.get("weights_options") or {})}
    if start is None or options.get("init", "zero") == "zero" or model.quantize != "none":
        return
    if (path := _smallest(start.adapter, bases.empty)) is None:
        return
    layer, value = bases.empty.denoiser.get_submodule(path), _weight(model.base, bases, path)
    if value is not None and value.numel() == layer.get_parameter("weight").numel():
        with _given(layer, value):
            attach().detach()


def _smallest(adapter: Adapter, base: Base) -> str | None:
    """Return the path, inside the denoiser, of the layer with the least weights that the adapter changes."""
    part = base.family.denoiser
    layers = {name.removeprefix(f"{part}."): name for name in adapter.deltas if name.startswith(f"{part}.")}
    known = {name: value.numel() for name, value in base.denoiser.named_parameters()}
    sizes = {path: known[f"{path}.weight"] for path in layers if f"{path}.weight" in known}
    return min(sizes, key=lambda path: sizes[path], default=None)


def _weight(name: str, bases: Bases, path: str) -> Tensor | None:
    """Return the weight of a layer of the denoiser of the base called `name`; None if it cannot be read."""
    if bases.loaded is not None:
        weight, _ = weight_and_bias(bases.loaded.denoiser.get_submodule(path))
        return None if weight.is_meta else weight.detach().cpu()
    try:
        source = name if name == "tiny" else locate_base(name, weights=False)
        with open_weights(source) as weights:
            return weights.get(f"{bases.empty.family.denoiser}.{path}.weight")
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
