"""Starting a run from an adapter file (`init_from`): its values become the attached method's initial values."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.method import Attached, Options, strip_text_model
from diffgraft.adapters.registry import get_method, methods
from diffgraft.bases import Base
from diffgraft.bases.layers import LAYERS, choose_layers, is_of_text, parts_of
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.groups import AdapterSettings
from diffgraft.trainers.run.adapter_file import AdapterFile


def load_init_weights(
    adapter: AdapterSettings, trigger: str, base: Base, live: Attached, start: AdapterFile
) -> set[str]:
    """Load the values of `start` into the attached method; return the paths of the modules that received some.

    Raises:
        DiffgraftError: the adapter holds modules that this recipe does not train, or values that do not fit.
    """
    source, shapes = start.adapter, {name: value.shape for name, value in live.trainable().items()}
    adapted = set(live.paths().values())
    try:
        loaded = live.load(source)
    except ValueError as error:
        hint = _hint(adapter, base, start, [path for path in source.deltas if path not in adapted])
        raise DiffgraftError(f"A run cannot start from {start.path}: {error}.{hint}") from error
    paths, name = live.paths(), start.path.name
    if missing := sorted(adapted - loaded):
        start.warn_once(
            f"{name} has no weights for {len(missing)} modules (e.g. {missing[0]}); they keep their initial values."
        )
    resized = {paths[key] for key, value in live.trainable().items() if shapes.get(key) != value.shape}
    if resized:
        start.warn_once(
            f"{len(resized)} modules (e.g. {min(resized)}) have the rank of {name} instead of the recipe's rank."
        )
    if source.tokens and trigger not in source.tokens:
        start.warn_once(f"The token {next(iter(source.tokens))!r} of {name} is renamed to the trigger {trigger!r}.")
    source_base = source.metadata.get("base")
    if isinstance(source_base, Mapping) and base.hash and source_base.get("hash", base.hash) != base.hash:
        start.warn_once(
            f"{name} was trained on another base ({source_base.get('name', 'of unknown name')}) than this run uses: "
            "its shapes fit, but results may be poor."
        )
    return loaded


def with_init_metadata(adapter: Adapter, start: AdapterFile | None) -> Adapter:
    """Return a trained adapter with the hash of the adapter it started from, and its rank, in the header."""
    if start is None:
        return adapter
    metadata = {**adapter.metadata, "init_from": start.hash}
    if "rank" in metadata:
        factors = [getattr(delta, "direction", delta) for deltas in adapter.deltas.values() for delta in deltas]
        sizes = {(delta.rank, delta.alpha) for delta in factors if isinstance(delta, FactorDelta)}
        metadata.pop("rank", None)
        metadata.pop("alpha", None)
        if len(sizes) == 1:
            ((metadata["rank"], metadata["alpha"]),) = sizes
    return replace(adapter, metadata=metadata)


def _hint(settings: AdapterSettings, base: Base, start: AdapterFile, unmatched: Collection[str]) -> str:
    """Advice on settings under which all of the adapter `start` can be loaded; empty if there are none.

    `unmatched` are paths of modules in the adapter that the recipe does not adapt.
    """
    adapter = start.adapter
    kinds = sorted({delta.kind for deltas in adapter.deltas.values() for delta in deltas})
    method = str(settings.options.get("weights", "lora")) if settings.method == "pivotal" else settings.method
    trained = {"locon": "lora", "tlora": "lora", "custom": "full"}.get(method, method)  # kind of the method's deltas
    if adapter.networks:
        kind = adapter.networks[0].kind
        return "" if settings.method == kind else f" Set method={kind}."
    with_weights = "custom" if adapter.method == "custom" else "pivotal"
    with_words = with_weights if kinds else "textual-inversion"
    if adapter.tokens and settings.method not in ("pivotal", "custom", with_words):
        return f" Set method={with_words}."
    if kinds not in ([], [trained]) and trained != "full":
        as_lora = f"convert it to a LoRA: diffgraft resize {start.path} --rank 8 --base BASE -o lora.safetensors"
        if len(kinds) > 1 or kinds[0] not in methods():
            return f" You can {as_lora}"
        return f" Set method={kinds[0]}" + ("." if kinds == ["lora"] else f", or {as_lora}")
    if not unmatched:
        return ""
    if missing := sorted(set(unmatched) - _modules(base)):
        return f" This base has no module {missing[0]}; the file was made for another base."
    needs_text = not settings.text_encoder and any(is_of_text(path) for path in unmatched)
    changes = ["text_encoder=true"] if needs_text else []
    if "layers" not in get_method(settings.method).unsupported_under(_options(settings)):
        wide = next((layers for layers in LAYERS if _modules(base, layers).issuperset(unmatched)), None)
        if wide is None:
            return " No value of layers includes all of them."
        current = settings.layers or get_method(settings.method).layers_under(_options(settings))
        changes += [f"layers={wide}"] if [*LAYERS].index(wide) > [*LAYERS].index(current) else []
    return f" Set {' '.join(changes)}." if changes else ""


def _options(settings: AdapterSettings) -> Options:
    return get_method(settings.method).read_options(settings.options)


def _modules(base: Base, layers: str = "") -> set[str]:
    """Paths of all modules of a base, or of those that the recipe's `layers` selects."""
    selected = {
        part: choose_layers(part, module, layers, base.family)
        if layers
        else [path for path, _ in module.named_modules()]
        for part, module in parts_of(base).items()
    }
    return {strip_text_model(f"{part}.{path}") for part, paths in selected.items() for path in paths}
