"""A recipe's method, laid over a base."""

from diffgraft.adapters.formats import check_dialect
from diffgraft.adapters.method import Attached, Spec, choose_layers
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base
from diffgraft.trainers.optim.lr_scales import freeze
from diffgraft.trainers.recipe.groups import AdapterSettings
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.init_from import InitAdapter, load_init_weights


def attach(recipe: Recipe, base: Base, start: InitAdapter | None = None) -> Attached:
    """Lay the recipe's method over a base, with the values that it starts from."""
    method = get_method(recipe.method)
    options, words = method.read_options(recipe.options), (recipe.trigger, recipe.noun)
    live = method.attach(
        base, Spec(_targets(recipe.adapter, base), recipe.rank, recipe.scale_alpha(), recipe.seed, options, *words)
    )
    try:
        freeze(
            recipe.optim,
            base,
            live,
            load_init_weights(recipe.adapter, recipe.trigger, base, live, start) if start else (),
        )
    except BaseException:
        live.detach()
        raise
    return live


def _targets(adapter: AdapterSettings, base: Base) -> dict[str, list[str]]:
    """Part of the base → paths inside it of the layers that are adapted."""
    method = get_method(adapter.method)
    layers = adapter.layers or method.layers_under(method.read_options(adapter.options))
    found = {"unet": choose_layers("unet", base.unet, layers)}
    for name, part in base.parts():
        if adapter.text_encoder and name.startswith("text_encoder"):
            found[name] = choose_layers(name, part, layers)
    return found


def check_format(dialect: str, adapter: AdapterSettings) -> None:
    """Refuse a file format that cannot hold what the recipe's method makes, before anything is trained.

    It is tried on the embedded base, which is small: a format holds a method on every base, or on none.

    Raises:
        DiffgraftError: the format cannot hold it.
    """
    if dialect == "auto":
        return
    method, small = get_method(adapter.method), load_base("tiny")
    options = method.read_options(adapter.options)
    paths = {"unet": choose_layers("unet", small.unet, adapter.layers or method.layers_under(options))}
    live = method.attach(small, Spec(paths, 1, 1.0, 0, options, "<checked>", ""))
    try:
        check_dialect(live.adapter({}), dialect)
    finally:
        live.detach()
