"""How well each method learns, measured on the embedded base: ``python -m benchmarks.learning``."""
