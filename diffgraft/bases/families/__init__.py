"""Families of bases, one file an architecture; `diffgraft.bases.family` is their contract."""
