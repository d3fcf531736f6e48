"""A recipe's method, laid over a base."""

from diffgraft.adapters.formats import check_dialect
from diffgraft.adapters.method import Attached, Spec
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.trainers.optim.lr_scales import check_attached, freeze
from diffgraft.trainers.recipe.groups import AdapterSettings
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.init_from import InitAdapter, load_init_weights


def attach(recipe: Recipe, base: Base, start: InitAdapter | None = None) -> Attached:
    """Attach the recipe's method to a base, with the values that it starts from.

    Raises:
        DiffgraftError: layers, learning rates, optimizer or the file that it starts from do not fit.
    """
    method = get_method(recipe.method)
    options, words = method.read_options(recipe.options), (recipe.trigger, recipe.noun)
    targets, alpha = _targets(recipe.adapter, base), recipe.scale_alpha()
    live = method.attach(base, Spec(targets, recipe.rank, alpha, recipe.seed, options, *words))
    try:
        loaded = load_init_weights(recipe.adapter, recipe.trigger, base, live, start) if start else set()
        freeze(recipe.optim, base, live, loaded)
        check_attached(recipe.optim, live)
    except BaseException:
        live.detach()
        raise
    return live


def _targets(adapter: AdapterSettings, base: Base) -> dict[str, list[str]]:
    """Part of the base → paths inside it of the layers that are adapted."""
    method = get_method(adapter.method)
    layers = adapter.layers or method.layers_under(method.read_options(adapter.options))
    networks = {base.family.denoiser: base.denoiser, **(base.text_encoders() if adapter.text_encoder else {})}
    return {name: choose_layers(name, network, layers) for name, network in networks.items()}


def check_format(dialect: str, adapter: AdapterSettings, base: Base | None = None) -> None:
    """Refuse a file format that cannot hold what the recipe's method makes, before anything is trained.

    It is tried on the embedded base, which is small, or on `base`: a format holds a method on every base of one kind of
    denoiser, or on none.

    Raises:
        DiffgraftError: the format cannot hold it.
    """
    if dialect == "auto":
        return
    method, tried = get_method(adapter.method), base or load_base("tiny")
    options = method.read_options(adapter.options)
    layers = adapter.layers or method.layers_under(options)
    paths = {tried.family.denoiser: choose_layers(tried.family.denoiser, tried.denoiser, layers)}
    live = method.attach(tried, Spec(paths, 1, 1.0, 0, options, "<checked>", ""))
    try:
        check_dialect(live.adapter({}), dialect)
    finally:
        live.detach()
