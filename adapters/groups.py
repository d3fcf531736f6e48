"""Where methods and dialects are found: a package of the project, and an entry-point group for outside packages."""

from typing import NamedTuple


class Plugins(NamedTuple):
    """Where the plugins of one kind are found."""

    package: str
    """The project's own package of such plugins; each of its modules may define one"""
    attribute: str
    """Name of the plugin object in such a module"""
    group: str
    """Entry-point group in which outside packages list their plugins"""


METHODS = Plugins("diffgraft.adapters.methods", "METHOD", "diffgraft.methods")
DIALECTS = Plugins("diffgraft.adapters.formats", "DIALECT", "diffgraft.dialects")
