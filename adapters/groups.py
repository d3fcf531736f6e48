"""Where methods and dialects are found: a package of ours, and an entry-point group for outside packages."""

from typing import NamedTuple


class Plugins(NamedTuple):
    """The plugins of one kind."""

    package: str
    """The package of our own; each of its modules may hold one"""
    attribute: str
    """What it is called in such a module"""
    group: str
    """Entry-point group in which outside packages name theirs"""


METHODS = Plugins("diffgraft.adapters.methods", "METHOD", "diffgraft.methods")
DIALECTS = Plugins("diffgraft.adapters.formats", "DIALECT", "diffgraft.dialects")
