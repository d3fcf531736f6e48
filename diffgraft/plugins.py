"""Discovery of plugins: modules of a package of the project, and entry points of outside packages."""

import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType
from typing import TypeVar

from diffgraft.errors import DiffgraftError

T = TypeVar("T")


def modules_of(package: str) -> list[ModuleType]:
    """Import the modules of a package and return them ordered by name; subpackages are left out."""
    path = importlib.import_module(package).__path__
    return [importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(path) if not info.ispkg]


def discover(kind: type[T], package: str, attribute: str, group: str) -> dict[str, T]:
    """Find all plugins of one kind and return them by their ``name``.

    Args:
        kind: class of the plugins.
        package: package of the project whose modules hold a plugin each.
        attribute: name of the plugin in those modules; modules without it are skipped.
        group: group of entry points that outside packages register plugins in.

    Raises:
        DiffgraftError: an entry point is not an instance of `kind`, or two plugins have the same name.
    """
    objects = [getattr(module, attribute, None) for module in modules_of(package)]
    plugins: dict[str, T] = {item.name: item for item in objects if isinstance(item, kind)}  # type: ignore[attr-defined]
    for entry in entry_points(group=group):
        plugin = entry.load()
        if not isinstance(plugin, kind):
            raise DiffgraftError(
                f"The entry point {entry.name!r} in {group} is {plugin!r}; a {kind.__name__} was expected. "
                f"Correct or uninstall the package that registers it ({entry.value})."
            )
        name: str = plugin.name  # type: ignore[attr-defined]
        if name in plugins:
            raise DiffgraftError(f"Two plugins in {group} are called {name!r}: rename the one from {entry.value}.")
        plugins[name] = plugin
    return plugins
