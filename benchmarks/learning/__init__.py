"""Benchmark of how well each method learns, on the embedded base: ``python -m benchmarks.learning``."""
