"""Training of the embedded base on procedurally drawn pictures: ``python -m diffgraft.bases.tiny.train``."""
