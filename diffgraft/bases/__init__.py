"""Frozen bases: `load_base` loads a `Base` by name, or from a folder, the hub or a single file."""

from diffgraft.bases.base import Base
from diffgraft.bases.family import Conditioning, Family, SizeConditioning
from diffgraft.bases.loading import load_base

__all__ = ["Base", "Conditioning", "Family", "SizeConditioning", "load_base"]
