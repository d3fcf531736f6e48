"""Frozen bases: `load_base` takes a name, a folder, a hub id or a single file to a `Base`."""

from diffgraft.bases.base import Base, Conditioning, Family, Framing
from diffgraft.bases.loading import FAMILIES, load_base

__all__ = ["FAMILIES", "Base", "Conditioning", "Family", "Framing", "load_base"]
