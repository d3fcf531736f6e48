"""Frozen bases: `load_base` takes a name, a folder, a hub id or a single file to a `Base`."""

from diffgraft.bases.base import Base
from diffgraft.bases.family import Conditioning, Family, SizeConditioning
from diffgraft.bases.loading import load_base

__all__ = ["Base", "Conditioning", "Family", "SizeConditioning", "load_base"]
