"""A run that starts from an adapter file: what is attached takes the values that the file has."""

import hashlib
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Attached, Options, strip_text_model
from diffgraft.adapters.registry import get_method, methods
from diffgraft.bases import Base
from diffgraft.bases.layers import LAYERS, choose_layers, is_of_text, parts_of
from diffgraft.bases.ldm_keys import layers_in_block
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.groups import AdapterSettings


@dataclass(frozen=True)
class InitAdapter:
    """An adapter file, read."""

    path: Path
    adapter: Adapter
    hash: str
    """SHA-256 of the file's bytes; of a folder's files, one behind the other"""
    _said: set[str] = field(default_factory=set, repr=False)

    def note(self, text: str) -> None:
        """Warn of something, once."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=5)


def read_init_adapter(path: str, base: Base) -> InitAdapter:
    """The file, or the folder of peft's or of a run, at `path`, its names counted as in `base`.

    Raises:
        DiffgraftError: it is missing, or no adapter.
    """
    place = Path(path).expanduser()
    adapter = load_adapter(place, layers_in_block(base))
    run = place / "adapter.safetensors"
    files = [run] if run.is_file() else sorted(place.rglob("adapter_*")) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return InitAdapter(place, adapter, digest.hexdigest())


def hash_of(init_from: str, start: InitAdapter | None) -> str | None:
    """That of the file a run begins with; empty where it begins with none, None where that file is gone."""
    return start.hash if start else None if init_from else ""


def load_init_weights(
    adapter: AdapterSettings, trigger: str, base: Base, live: Attached, start: InitAdapter
) -> set[str]:
    """Give what is attached the values of `start`; returns the paths of the modules that have some of it.

    Raises:
        DiffgraftError: the file holds something that this recipe does not train, or that does not fit.
    """
    held, before = start.adapter, {name: value.shape for name, value in live.trainable().items()}
    adapted = set(live.paths().values())
    try:
        taken = live.load(held)
    except ValueError as error:
        hint = _hint(adapter, base, start, [path for path in held.deltas if path not in adapted])
        raise DiffgraftError(f"A run cannot start from {start.path}: {error}.{hint}") from error
    paths, name = live.paths(), start.path.name
    if fresh := sorted(adapted - taken):
        start.note(f"{name} has nothing for {len(fresh)} modules, such as {fresh[0]}: those start afresh.")
    resized = {paths[key] for key, value in live.trainable().items() if before.get(key) != value.shape}
    if resized:
        start.note(f"{len(resized)} modules have the rank of {name}, and not the recipe's, such as {min(resized)}.")
    if held.tokens and trigger not in held.tokens:
        start.note(f"The word {next(iter(held.tokens))!r} of {name} is called {trigger!r} from now on.")
    made_for = held.metadata.get("base")
    if isinstance(made_for, Mapping) and base.hash and made_for.get("hash", base.hash) != base.hash:
        start.note(
            f"{name} was trained on {made_for.get('name', 'another base')}, not on this base: it fits, and no more."
        )
    return taken


def with_init_metadata(adapter: Adapter, start: InitAdapter | None) -> Adapter:
    """A trained adapter, its header telling the hash of the file it began as, and the rank that it has from there."""
    if start is None:
        return adapter
    said = {**adapter.metadata, "init_from": start.hash}
    if "rank" in said:
        factors = [getattr(delta, "direction", delta) for deltas in adapter.deltas.values() for delta in deltas]
        sizes = {(delta.rank, delta.alpha) for delta in factors if isinstance(delta, FactorDelta)}
        del said["rank"], said["alpha"]
        if len(sizes) == 1:
            ((said["rank"], said["alpha"]),) = sizes
    return replace(adapter, metadata=said)


def _hint(settings: AdapterSettings, base: Base, start: InitAdapter, strange: Collection[str]) -> str:
    """A sentence that says what to set, so that all of the file has a place; empty where nothing is known to help."""
    adapter = start.adapter
    kinds = sorted({delta.kind for deltas in adapter.deltas.values() for delta in deltas})
    method = str(settings.options.get("weights", "lora")) if settings.method == "pivotal" else settings.method
    trained = "lora" if method == "locon" else method  # of which it is made
    if adapter.networks:
        return "" if settings.method == "hypernetwork" else " Set method=hypernetwork."
    if adapter.tokens and settings.method not in ("pivotal", "" if kinds else "textual-inversion"):
        return f" Set method={'pivotal' if kinds else 'textual-inversion'}."
    if kinds not in ([], [trained]) and trained != "full":
        as_lora = f"make a LoRA of it: diffgraft resize {start.path} -o lora.safetensors"
        if len(kinds) > 1 or kinds[0] not in methods():
            return f" You can {as_lora}"
        return f" Set method={kinds[0]}" + ("." if kinds == ["lora"] else f", or {as_lora}")
    if not strange:
        return ""
    if lacking := sorted(set(strange) - _modules(base)):
        return f" This base has no {lacking[0]}; the file was made for another."
    said = ["text_encoder=true"] if not settings.text_encoder and any(is_of_text(path) for path in strange) else []
    if "layers" not in get_method(settings.method).unsupported_under(_options(settings)):
        wide = next((layers for layers in LAYERS if _modules(base, layers).issuperset(strange)), None)
        if wide is None:
            return " There is no choice of layers that has them all."
        chosen = get_method(settings.method)
        now = settings.layers or chosen.layers_under(_options(settings))
        said += [f"layers={wide}"] if [*LAYERS].index(wide) > [*LAYERS].index(now) else []
    return f" Set {' '.join(said)}." if said else ""


def _options(settings: AdapterSettings) -> Options:
    return get_method(settings.method).read_options(settings.options)


def _modules(base: Base, layers: str = "") -> set[str]:
    """Paths of the modules of a base, or of those in a choice of layers."""
    inside = {
        part: choose_layers(part, module, layers) if layers else [path for path, _ in module.named_modules()]
        for part, module in parts_of(base).items()
    }
    return {strip_text_model(f"{part}.{path}") for part, paths in inside.items() for path in paths}
