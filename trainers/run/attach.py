"""Attaching a recipe's method to a base."""

from diffgraft.adapters.formats import check_dialect
from diffgraft.adapters.method import Attached, Spec
from diffgraft.adapters.methods.student import is_replaced
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.bases.registry import tokenizers
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.objectives.registry import objectives
from diffgraft.trainers.optim.lr_scales import check_attached, freeze
from diffgraft.trainers.recipe.groups import AdapterSettings, ObjectiveSettings
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.adapter_file import AdapterFile
from diffgraft.trainers.run.init_from import load_init_weights


def attach(recipe: Recipe, base: Base, start: AdapterFile | None = None) -> Attached:
    """Attach the recipe's method to a base, with the initial values of `start` if given.

    Raises:
        DiffgraftError: layers, learning-rate scales, optimizer or the adapter `start` do not fit the base.
    """
    if is_replaced(base.denoiser):
        raise DiffgraftError(
            "A student computes in the place of this base's denoiser, so that nothing else can be trained on it: write "
            "the student as a base with `diffgraft merge`, and train on that base."
        )
    method = get_method(recipe.method)
    options, words = method.read_options(recipe.options), (recipe.trigger, recipe.noun)
    targets, alpha = _targets(recipe.adapter, base), recipe.alpha_or_rank()
    live = method.attach(base, Spec(targets, recipe.rank, alpha, recipe.seed, options, *words))
    try:
        loaded = load_init_weights(recipe.adapter, recipe.trigger, base, live, start) if start else set()
        freeze(recipe.optim, base, live, loaded)
        check_attached(recipe.optim, live)
        check_strengths(recipe.objective, recipe.adapter, live)
    except BaseException:
        live.detach()
        raise
    return live


def check_strengths(objective: ObjectiveSettings, adapter: AdapterSettings, live: Attached) -> None:
    """Check that an attached method can act with the strengths that the objective trains at.

    Raises:
        DiffgraftError: the objective trains at strengths other than 1, and the method has none while it is trained.
    """
    if not (name := objective.loss.objective) or live.has_strength:
        return
    kind = objectives()[name]
    others = [strength for strength in kind.strengths(kind.read_options(objective.loss.options)) if strength != 1]
    if others:
        raise DiffgraftError(
            f"loss.objective={name} trains at the strength {others[0]:g}, but an adapter of method={adapter.method} "
            "with these options always has strength 1 while it is trained: use another method, such as lora."
        )


def _targets(adapter: AdapterSettings, base: Base) -> dict[str, list[str]]:
    """Name of each adapted part of the base → paths, inside that part, of the adapted layers.

    Raises:
        DiffgraftError: a part has none of the layers.
    """
    method = get_method(adapter.method)
    layers = adapter.layers or method.layers_under(method.read_options(adapter.options))
    networks = {base.family.denoiser: base.denoiser, **(base.text_encoders() if adapter.text_encoder else {})}
    targets = {name: choose_layers(name, network, layers, base.family) for name, network in networks.items()}
    for name, paths in targets.items():
        if not paths:
            fix = "Set text_encoder=false" if name in tokenizers() else "Choose another method"
            raise DiffgraftError(
                f"Invalid value layers={layers!r}: the {name} of this base has no such layers. {fix}, or other layers."
            )
    return targets


def check_format(dialect: str, adapter: AdapterSettings, base: Base | None = None) -> None:
    """Check that a file format can store adapters of the recipe's method, before anything is trained.

    The check exports an adapter of `base`, or of the small base `tiny`: whether a format can store a method depends on
    the kind of denoiser alone.

    Raises:
        DiffgraftError: the format cannot store the method.
    """
    if dialect == "auto":
        return
    method, base = get_method(adapter.method), base or load_base("tiny")
    options = method.read_options(adapter.options)
    layers = adapter.layers or method.layers_under(options)
    paths = {base.family.denoiser: choose_layers(base.family.denoiser, base.denoiser, layers, base.family)}
    live = method.attach(base, Spec(paths, 1, 1.0, 0, options, "<checked>", ""))
    try:
        check_dialect(live.adapter({}), dialect)
    finally:
        live.detach()
