"""Finding what extends the project: one module of a package each, or an entry point of an outside package."""

import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType
from typing import TypeVar

from diffgraft.errors import DiffgraftError

T = TypeVar("T")


def modules_of(package: str) -> list[ModuleType]:
    """The modules of a package, imported, in the order of their names; not those of packages inside it."""
    path = importlib.import_module(package).__path__
    return [importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(path) if not info.ispkg]


def discover(kind: type[T], package: str, attribute: str, group: str) -> dict[str, T]:
    """Every `kind` by its ``name``: what modules of `package` hold as `attribute`, and the entry points in `group`.

    Raises:
        DiffgraftError: an entry point is no `kind`, or two have one name.
    """
    own = [getattr(module, attribute, None) for module in modules_of(package)]
    found: dict[str, T] = {one.name: one for one in own if isinstance(one, kind)}  # type: ignore[attr-defined]
    for entry in entry_points(group=group):
        other = entry.load()
        if not isinstance(other, kind):
            raise DiffgraftError(
                f"The entry point {entry.name!r} in {group} is {other!r}; a {kind.__name__} was expected."
            )
        name: str = other.name  # type: ignore[attr-defined]
        if name in found:
            raise DiffgraftError(f"Two plugins in {group} are called {name!r}; the one from {entry.value} must change.")
        found[name] = other
    return found
