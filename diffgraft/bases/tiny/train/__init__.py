"""How the embedded base was trained, from pictures it draws itself: ``python -m diffgraft.bases.tiny.train``."""
